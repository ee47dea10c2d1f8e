"""The study of a search: trials that several processes share through a database, and what is proposed next.

A study has as many slots as trials are wanted. A process claims a slot by adding a running trial for it; of two that claim the
same the one that came first has it. What is proposed for a slot depends on the seed, the slot and the trials of earlier
batches only: a search that was killed proposes again what it had proposed.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergecli.evaluation.search_space import Dimension, Space, grid
from mergecli.evaluation.study_database import Database, quiet
from mergecli.results.statistics import Count
from mergecli.runtime.errors import UsageError, did_you_mean, listed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "sobol", "cmaes", "random", "grid")
START = 10
"""Trials that TPE draws at random before it learns from them, in one batch."""
BATCH = 4
"""Trials of TPE that are proposed together, and share passes over the models: each learns from those before the batch only."""
WIDE_BATCH = 16
"""The same of samplers that learn nothing."""
LOST = 1800.0
"""Seconds after which a running trial of another machine that gives no sign is taken for lost."""
_SIGN = 30.0
"""Seconds between signs."""

Outcome = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial of a study."""

    slot: int
    values: Mapping[str, Any]
    """Key -> value, of those settings that its method has."""
    outcome: Outcome
    objective: float | None = None
    """What the search makes large; of a pruned trial, as far as it was counted."""
    counts: Mapping[str, Count] = field(default_factory=dict[str, Count])
    """Task -> images that were classified correctly, and images."""


class Study:
    """The trials of one search in a database."""

    def __init__(
        self,
        url: str,
        name: str,
        space: Space,
        trials: int,
        sampler: str,
        seed: int,
        facts: Mapping[str, Any],
    ) -> None:
        """Opens the study, or begins it.

        Args:
            trials: slots, those of earlier calls included.
            facts: what all trials share; a study that was begun with others is refused.

        Raises:
            UsageError: Optuna is missing, an argument is wrong, or the study is another one.
            InputError: the database cannot be opened.
        """
        self.space, self.sampler, self.seed = space, sampler, seed
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "id": uuid.uuid4().hex,
        }
        self._last_sign = 0.0
        self._database = Database(url)
        self.slots = len(self._grid(trials)) if sampler == "grid" else trials
        self._study, known = self._database.open(name, facts)
        if differing := [
            f"{key}: {known.get(key)}, not {value}" for key, value in facts.items() if known.get(key) != value
        ]:
            raise UsageError(
                f"{self._database}: the study `{name}` is another search:\n{listed(differing)}",
                "name another folder with `-o`, or another study with `--study`",
            )

    # trials

    @property
    def trials(self) -> list[Trial]:
        """One for each slot that is taken, in order."""
        return [self._trial(each) for _, each in sorted(self._taken().items())]

    def _trial(self, found: FrozenTrial) -> Trial:
        outcomes: dict[str, Outcome] = {"RUNNING": "running", "COMPLETE": "complete", "PRUNED": "pruned"}
        seen = found.intermediate_values
        counts = {task: Count(*each) for task, each in found.user_attrs.get("counts", {}).items()}
        # in the order of the space, whatever the database has made of it
        values = {
            each.key: each.values[each.labels.index(found.params[each.key])]
            if each.values
            else found.params[each.key]
            for each in self.space.dimensions
            if each.key in found.params
        }
        return Trial(
            found.user_attrs["slot"], values, outcomes.get(found.state.name, "failed"),
            found.value if found.value is not None else seen[max(seen)] if seen else None, counts,
        )  # fmt: skip

    def _dimension(self, key: str) -> Dimension:
        return next(each for each in self.space.dimensions if each.key == key)

    def _all(self) -> list[FrozenTrial]:
        with self._database.in_use():
            return [each for each in self._study.get_trials(deepcopy=False) if "slot" in each.user_attrs]

    def _taken(self) -> dict[int, FrozenTrial]:
        """Slot -> its trial: of several the first."""
        found: dict[int, FrozenTrial] = {}
        for each in self._all():
            if each.state.name != "FAIL":
                found.setdefault(each.user_attrs["slot"], each)
        return found

    def claim(self) -> list[Trial]:
        """Slots of the first batch that has free ones, with proposals; none where every slot is taken."""
        self._forget_lost()
        taken = self._taken()
        free = [slot for slot in range(self.slots) if slot not in taken]
        if not free:
            return []
        first, size = self._batch(free[0])
        mine: list[Trial] = []
        for slot in (each for each in free if first <= each < first + size):
            values = self._propose(slot, first)
            if self._add(slot, values):
                mine.append(Trial(slot, values, "running"))
        return mine or self.claim()

    def _add(self, slot: int, values: Mapping[str, Any]) -> bool:
        """Adds a running trial; whether the slot is ours."""
        from optuna.trial import TrialState, create_trial

        with self._database.in_use():
            trial = create_trial(
                state=TrialState.RUNNING,
                params={key: self._written(key, value) for key, value in values.items()},
                distributions={key: _distribution(self._dimension(key)) for key in values},
                user_attrs={"slot": slot, "owner": self._owner, "sign": time.time()},
            )
            self._study.add_trial(trial)
        owner = self._taken()[slot].user_attrs["owner"]
        if owner["id"] == self._owner["id"]:
            return True
        own = [
            each
            for each in self._all()
            if each.user_attrs["slot"] == slot and each.user_attrs["owner"] == self._owner
        ]
        self._end(own[-1].number, "FAIL")
        return False

    def _written(self, key: str, value: Any) -> Any:
        dimension = self._dimension(key)
        return dimension.labels[dimension.values.index(value)] if dimension.values else value

    def tell(self, trial: Trial, stage: int) -> None:
        """Keeps what is known of a trial after a stage, counted from 1."""
        assert trial.objective is not None
        with self._database.in_use():
            found = self._taken()[trial.slot]
            counts = {task: [each.correct, each.images] for task, each in trial.counts.items()}
            self._database.storage.set_trial_user_attr(found._trial_id, "counts", counts)  # pyright: ignore[reportPrivateUsage]
            self._database.storage.set_trial_intermediate_value(found._trial_id, stage, trial.objective)  # pyright: ignore[reportPrivateUsage]

    def middle(self, stage: int) -> float:
        """The objective that the better half of all trials reach at a stage."""
        known = sorted(
            each.intermediate_values[stage]
            for each in self._taken().values()
            if stage in each.intermediate_values
        )
        return known[len(known) // 2]

    def finish(self, trial: Trial) -> None:
        """Ends a trial that is counted to the end."""
        self._end(self._taken()[trial.slot].number, "COMPLETE", trial.objective)

    def prune(self, trial: Trial) -> None:
        """Ends a trial that is not worth more images."""
        self._end(self._taken()[trial.slot].number, "PRUNED")

    def kept(self) -> str:
        """What is kept after an interruption."""
        done = sum(each.state.is_finished() for each in self._taken().values())
        return f"{done} of {self.slots} trials are kept" if done else ""

    def give_up(self, trials: Sequence[Trial]) -> None:
        """Frees the slots of trials that were not finished."""
        taken = self._taken()
        for each in trials:
            found = taken.get(each.slot)
            if (
                found is not None
                and found.state.name == "RUNNING"
                and found.user_attrs["owner"]["id"] == self._owner["id"]
            ):
                self._end(found.number, "FAIL")

    def _end(self, number: int, state: str, objective: float | None = None) -> None:
        from optuna.trial import TrialState

        with self._database.in_use():
            try:
                self._study.tell(number, objective, state=TrialState[state])
            except ValueError as error:
                if "Cannot tell" not in str(error):  # another process has freed the slot
                    raise

    def sign(self) -> None:
        """Shows other machines that this process still works."""
        now = time.time()
        if now - self._last_sign < _SIGN:
            return
        self._last_sign = now
        for each in self._all():
            if each.state.name == "RUNNING" and each.user_attrs["owner"]["id"] == self._owner["id"]:
                with self._database.in_use():
                    self._database.storage.set_trial_user_attr(each._trial_id, "sign", now)  # pyright: ignore[reportPrivateUsage]

    def _forget_lost(self) -> None:
        """Frees the slots of processes that have gone."""
        for each in self._all():
            if each.state.name != "RUNNING":
                continue
            owner = each.user_attrs["owner"]
            if owner["host"] == self._owner["host"]:
                lost = owner["id"] != self._owner["id"] and _began(owner["pid"]) != owner["began"]
            else:
                lost = time.time() - each.user_attrs["sign"] > LOST
            if lost:
                self._end(each.number, "FAIL")

    @property
    def others(self) -> int:
        """Trials that other processes work on."""
        return sum(each.state.name == "RUNNING" for each in self._taken().values())

    # proposals

    def _batch(self, slot: int) -> tuple[int, int]:
        """The first slot of the batch that a slot belongs to, and how many it has."""
        if self.sampler == "tpe":
            if slot < START:
                return 0, START
            return slot - (slot - START) % BATCH, BATCH
        size = self._generation if self.sampler == "cmaes" else WIDE_BATCH
        return slot - slot % size, size

    def _propose(self, slot: int, first: int) -> dict[str, Any]:
        """The values for a slot of the batch that begins with `first`."""
        if self.sampler == "grid":
            return self._grid(self.slots)[slot]
        if self.sampler == "sobol":
            return self.space.values(_shares(self._sobol(slot), self.space))
        if self.sampler == "cmaes":
            return self._propose_cmaes(slot, first)
        return self._propose_optuna(slot, first)

    def _grid(self, trials: int) -> list[dict[str, Any]]:
        if self._grid_points is None:
            self._grid_points = grid(self.space, trials)
        return self._grid_points

    _grid_points: list[dict[str, Any]] | None = None

    def _sobol(self, slot: int) -> list[float]:
        """The point of a scrambled Sobol sequence with the slot's number (Owen 1998; Joe and Kuo 2008)."""
        from torch.quasirandom import SobolEngine

        engine = SobolEngine(len(self.space.dimensions), scramble=True, seed=self.seed)
        return engine.fast_forward(slot).draw(1)[0].tolist()

    def _propose_optuna(self, slot: int, first: int) -> dict[str, Any]:
        from optuna import create_study
        from optuna.samplers import RandomSampler, TPESampler

        seed = _seed(self.seed, slot)
        with quiet():
            sampler: Any = RandomSampler(seed)
            if self.sampler == "tpe":
                sampler = TPESampler(
                    seed=seed, n_startup_trials=START, constant_liar=True, multivariate=True, group=True
                )
            study = create_study(direction="maximize", sampler=sampler)
            if self.sampler == "tpe":
                study.add_trials(
                    [
                        _as_seen(each, first)
                        for number, each in sorted(self._taken().items())
                        if _counts(each, number, slot, first)
                    ]
                )
            trial = study.ask()
            return self.space.values(lambda each: _suggested(trial, each))

    @property
    def _ranges(self) -> list[Dimension]:
        return [each for each in self.space.dimensions if not each.values]

    @cached_property
    def _generation(self) -> int:
        """Trials of a generation of CMA-ES."""
        return max(BATCH, 4 + int(3 * _log(len(self._ranges))))

    def _propose_cmaes(self, slot: int, first: int) -> dict[str, Any]:
        """CMA-ES (Hansen, arXiv 1604.00772) over the ranges; values to choose are drawn at random. The generations before are
        replayed, each as soon as it is whole."""
        import numpy as np
        from cmaes import CMA

        ranges, size = self._ranges, self._generation
        bounds = np.array([[0.0, 1.0]] * len(ranges))
        optimizer = CMA(
            mean=np.full(len(ranges), 0.5),
            sigma=1 / 4,
            bounds=bounds,
            seed=_seed(self.seed, 0),
            population_size=size,
        )
        taken = self._taken()
        for start in range(0, first, size):
            asked = [optimizer.ask() for _ in range(size)]
            trials = [self._trial(taken[each]) for each in range(start, start + size) if each in taken]
            if len(trials) < size or any(
                each.objective is None or each.outcome == "running" for each in trials
            ):
                continue
            seen = [
                np.array(
                    [
                        each.share(trial.values[each.key]) if each.key in trial.values else x
                        for each, x in zip(ranges, point, strict=True)
                    ]
                )
                for point, trial in zip(asked, trials, strict=True)
            ]
            optimizer.tell(
                [(point, -float(trial.objective or 0.0)) for point, trial in zip(seen, trials, strict=True)]
            )
        own = [optimizer.ask() for _ in range(size)][slot - first]
        chosen = np.random.default_rng(_seed(self.seed, slot)).random(len(self.space.dimensions))
        shares = {each.key: float(share) for each, share in zip(self.space.dimensions, chosen, strict=True)}
        shares |= {each.key: float(share) for each, share in zip(ranges, own, strict=True)}
        return self.space.values(lambda each: each.at(shares[each.key]))

    # what the trials say

    def importance(self) -> dict[str, float]:
        """Key -> share of the objective's variation among the better trials that the setting explains (PED-ANOVA, Watanabe et
        al., IJCAI 2023), the most important first; empty where there are too few trials."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        complete = [each for each in self._taken().values() if each.state.name == "COMPLETE"]
        if len(complete) < 2 or len({each.value for each in complete}) < 2:
            return {}
        with quiet():
            from optuna import create_study

            study = create_study(direction="maximize")
            study.add_trials(complete)
            try:
                return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))
            except (ValueError, RuntimeError):
                return {}


def check_sampler(sampler: str, space: Space) -> None:
    """Raises UsageError if there is no such sampler, it cannot search this space, or a package is missing."""
    if sampler not in SAMPLERS:
        near = did_you_mean(sampler, SAMPLERS)
        raise UsageError(f"--sampler: expected one of {', '.join(SAMPLERS)}, got `{sampler}`{near}")
    for package in ("optuna", *(["cmaes"] if sampler == "cmaes" else [])):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"a search needs {package}", "pip install 'mergecli[search]'")
    if sampler == "cmaes" and all(each.values for each in space.dimensions):
        raise UsageError(
            "--sampler cmaes: needs a range to search", "`--sampler tpe` chooses among values too"
        )


def _counts(trial: FrozenTrial, number: int, slot: int, first: int) -> bool:
    """Whether a proposal for a slot learns from another slot's trial: of an earlier batch if it has ended, or of its own batch."""
    return number < slot if number >= first else trial.state.name in ("COMPLETE", "PRUNED", "RUNNING")


def _as_seen(trial: FrozenTrial, first: int) -> FrozenTrial:
    """The trial as it was when the batch was proposed: those of the batch itself were running."""
    from optuna.trial import TrialState, create_trial

    if trial.user_attrs["slot"] < first:
        return trial
    return create_trial(state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions)


def _shares(point: Sequence[float], space: Space) -> Callable[[Dimension], Any]:
    shares = {each.key: share for each, share in zip(space.dimensions, point, strict=True)}
    return lambda dimension: dimension.at(shares[dimension.key])


def _suggested(trial: Any, dimension: Dimension) -> Any:
    if dimension.values:
        return dimension.values[
            dimension.labels.index(trial.suggest_categorical(dimension.key, dimension.labels))
        ]
    low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
    if dimension.whole:
        return dimension.near(
            trial.suggest_int(dimension.key, int(low), int(high), log=log, step=int(step or 1))
        )
    return dimension.near(trial.suggest_float(dimension.key, low, high, log=log, step=step))


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.values:
        return CategoricalDistribution(dimension.labels)
    low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
    if dimension.whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(low, high, log=log, step=step)


def _seed(seed: int, slot: int) -> int:
    return int.from_bytes(sha256(f"{seed} {slot}".encode()).digest()[:4], "little")


def _log(count: int) -> float:
    from math import log

    return log(max(count, 1))


def _began(pid: int) -> str:
    """What tells a process from others that had its number before; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return ""
    return "there"
