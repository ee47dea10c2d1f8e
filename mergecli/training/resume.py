"""How far a training has come: what it needs to go on as if nothing had happened, and its best and last good weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.runtime.distributed import Ranks, is_first
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, listed, shown
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import about, table_differences

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
FACTS = ("step", "updates", "best_step", "scale", "growth")


def state_file(output: Path) -> Path:
    """Where the state of what trains `output` is kept."""
    return output.with_name(f".{output.name.removesuffix('.safetensors')}.resume.safetensors")


@dataclass(frozen=True)
class Stored:
    """What stands in a file."""

    facts: Mapping[str, float]
    tensors: Mapping[str, Tensor]


def work_text(work: Mapping[str, Any]) -> str:
    """What a training depends on, settings, base, images, as the metadata of its state has it."""
    return json.dumps(work)


def read_state(
    path: Path, work: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], tasks: int
) -> Stored | None:
    """What stands in the file; None if there is none, or it is damaged, which is warned of.

    Raises:
        UsageError: it is of other work; every difference is named.
    """
    if not path.exists():
        return None
    try:
        with open_checkpoint(path) as stored:
            known: Any = json.loads(stored.metadata["work"])
            differing = [
                f"`{key}`: {_text(before)} -> {_text(after)}"
                for key, before, after in table_differences(known, json.loads(work_text(work)))
            ]
            facts: dict[str, float] = {}
            tensors: dict[str, Tensor] = {}
            if not differing:
                told: Any = json.loads(stored.metadata["facts"])
                facts = {name: float(told[name]) for name in FACTS}
                parts = ["weights", *MOMENTS, *(["best"] if facts["best_step"] else [])]
                names = [f"{part}.{name}" for part in parts for name in parameters]
                tensors = {name: stored.read(name) for name in [*names, "losses", "validation"]}
                _expect_sound(facts, tensors, parameters, tasks)
    except (InputError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        text = f"{path}: is damaged, or of another version: training begins anew"
        warnings.warn(text, MergecliWarning, stacklevel=2)
        return None
    if differing:
        raise UsageError(
            f"{path}: holds the state of a training that was begun otherwise:\n{listed(differing, 10)}",
            "give the same settings to go on, or `--fresh` (`fresh=True`) to begin anew",
        )
    return Stored(facts, tensors)


def _expect_sound(
    facts: Mapping[str, float],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tasks: int,
) -> None:
    """Raises ValueError unless shapes and numbers are those of a state."""
    measured = tensors["validation"]
    is_sound = all(
        each.shape == parameters[name.partition(".")[2]].shape
        for name, each in tensors.items()
        if name not in ("losses", "validation")
    )
    is_sound &= tensors["losses"].shape == (int(facts["step"]), tasks)
    is_sound &= measured.dim() == 2 and measured.shape[1] == 1 + tasks
    is_sound &= all(bool(each.isfinite().all()) for each in tensors.values())
    is_sound &= facts["best_step"] in {0.0, *measured.flatten()[:: tasks + 1].tolist()}
    if not is_sound:
        raise ValueError("not a state")


def _text(value: object) -> str:
    return "none" if value is None else shown(value)


class TrainingState:
    """Trained weights, Adam's moments, the best weights so far, and what happened at each step.

    Adam counts its `updates`; they are fewer than the steps where float16 had to leave some out.
    """

    def __init__(
        self,
        output: Path,
        parameters: Mapping[str, nn.Parameter],
        work: Mapping[str, Any],
        tasks: int,
        ranks: Ranks,
        *,
        fresh: bool = False,
    ) -> None:
        """Begins, or goes on from the file beside the output; with `fresh` that is removed.

        Raises:
            UsageError: the file is of other `work`.
        """
        import torch

        self.output = output
        self.path = state_file(output)
        self.parameters = parameters
        self.tasks = tasks
        self.losses: list[list[float]] = []
        """(steps, T)"""
        self.validation: dict[int, list[float]] = {}
        """Step -> (T,) accuracies."""
        self.best_step = 0
        self.best: dict[str, Tensor] = {}
        """The weights of that step; only in the first process."""
        self.good_step: int | None = None
        """The last step whose weights are known to give numbers."""
        self.good: dict[str, Tensor] = {}
        """The weights of that step, of the first one on; only in the first process, and where there are no best ones."""
        self.saved = (0, 0)
        """Steps and validations in the file."""
        self.is_whole = True
        """Whether no step is half done."""
        self.optimizer: Optimizer = torch.optim.Adam(
            parameters.values(), lr=work["learning_rate"], weight_decay=work["weight_decay"]
        )
        self.device = next(iter(parameters.values())).device
        # scales gradients up so that float16 can hold them; what it does is skipped elsewhere
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=work.get("precision") == "float16")
        if self.scaler.is_enabled():
            self.scaler.scale(
                torch.zeros((), device=self.device)
            )  # a process may have no image of the first step
        self.work = work
        if fresh and is_first():
            self.path.unlink(missing_ok=True)
        self._load(ranks)

    @property
    def step(self) -> int:
        """How many steps have been done."""
        return len(self.losses)

    def validated(self, accuracies: list[float]) -> None:
        """Notes the accuracies of the weights as they are now; of equally good ones the earlier are the best."""
        self.validation[self.step] = accuracies
        if not self.best_step or sum(accuracies) > sum(self.validation[self.best_step]):
            self.best_step = self.step
            if is_first():
                self.best = {name: each.detach().cpu().clone() for name, each in self.parameters.items()}

    def gave_numbers(self) -> None:
        """Notes that the weights as they are now gave numbers, and copies them if there are none that are better."""
        import torch

        self.good_step = self.step
        if not is_first() or self.best_step or not self.step:
            self.good = {}
            return
        if not self.good:
            self.good = {name: torch.empty_like(each) for name, each in self.parameters.items()}
        with torch.no_grad():
            for name, each in self.parameters.items():
                self.good[name].copy_(each)

    def take_best(self) -> None:
        """Puts the best weights in the place of the last ones."""
        self._take(self.best)

    def take_last_good(self) -> int:
        """Puts the best weights, or else the last ones that gave numbers, in the place of those that do not; the step
        that they are of, 0 if there are none, or none that learnt anything."""
        self._take(self.best or self.good)
        return self.best_step or self.good_step or 0

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, each in weights.items():
                self.parameters[name].copy_(each)

    def save(self) -> None:
        """Writes the state, if there is something new, whole and finite; the one before is replaced when it stands."""
        import torch

        from mergecli.storage.safetensors_writer import save_tensors

        is_new = self.step and self.saved != (self.step, len(self.validation))
        if not (is_first() and self.is_whole and is_new):
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach().cpu()
            for part, key in MOMENTS.items():
                moment = self.optimizer.state[parameter].get(key)
                tensors[f"{part}.{name}"] = torch.zeros_like(parameter) if moment is None else moment
        tensors |= {f"best.{name}": best for name, best in self.best.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64).view(-1, self.tasks)
        tensors["validation"] = self._validation()
        if not all(bool(each.isfinite().all()) for each in tensors.values()):
            return  # the last good state stays
        facts = json.dumps(self._facts())
        written = about("training state", work=work_text(self.work), facts=facts)
        save_tensors({name: each.cpu().contiguous() for name, each in tensors.items()}, self.path, written)
        self._note()

    def _note(self) -> None:
        self.saved = (self.step, len(self.validation))

    def _validation(self) -> Tensor:
        """(validations, 1 + T): steps and accuracies."""
        import torch

        rows = [[step, *accuracies] for step, accuracies in self.validation.items()]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 1 + self.tasks)

    def _facts(self) -> dict[str, float]:
        first = next(iter(self.parameters.values()))
        updates = float(self.optimizer.state[first].get("step", 0)) if first in self.optimizer.state else 0.0
        scaling: dict[str, Any] = self.scaler.state_dict()
        values = (
            self.step,
            updates,
            self.best_step,
            scaling.get("scale", 0),
            scaling.get("_growth_tracker", 0),
        )
        return dict(zip(FACTS, map(float, values), strict=True))

    def _load(self, ranks: Ranks) -> None:
        """Goes on from the file; all processes go on where the first one does, or refuse as it does."""
        import torch

        found: Stored | None = None
        refused: UsageError | None = None
        if is_first():
            try:
                found = read_state(self.path, self.work, self.parameters, self.tasks)
            except UsageError as error:
                refused = error
        ranks.refuse(refused, self.device)
        none = dict.fromkeys(FACTS, 0.0)
        told = torch.tensor(
            [*(found.facts if found else none).values()], dtype=torch.float64, device=self.device
        )
        facts = dict(zip(FACTS, ranks.first(told).tolist(), strict=True))
        if not facts["step"]:
            return
        rows = torch.tensor([len(found.tensors["validation"]) if found else 0], device=self.device)
        shapes = {
            "losses": (int(facts["step"]), self.tasks),
            "validation": (int(ranks.first(rows)), 1 + self.tasks),
        }

        def everywhere(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            own = torch.zeros(shape, dtype=dtype) if found is None else found.tensors[name]
            return ranks.first(own.to(self.device, dtype).contiguous())

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                shape, dtype = tuple(parameter.shape), parameter.dtype
                parameter.copy_(everywhere(f"weights.{name}", shape, dtype))
                if facts["updates"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(facts["updates"], dtype=torch.float32),
                        **{key: everywhere(f"{part}.{name}", shape, dtype) for part, key in MOMENTS.items()},
                    }
        self.losses = everywhere("losses", shapes["losses"], torch.float64).tolist()
        measured: list[list[float]] = everywhere("validation", shapes["validation"], torch.float64).tolist()
        self.validation = {int(row[0]): row[1:] for row in measured}
        self.best_step = int(facts["best_step"])
        if found and self.best_step:
            self.best = {name: found.tensors[f"best.{name}"] for name in self.parameters}
        if self.scaler.is_enabled():
            scaling: dict[str, Any] = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {**scaling, "scale": facts["scale"], "_growth_tracker": int(facts["growth"])}
            )
        self._note()
