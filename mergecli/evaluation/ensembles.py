"""Ensembles: results of several towers together, made of the logits that the units of an evaluation kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergecli.evaluation.counting import Counts
from mergecli.evaluation.facts import TowerFacts
from mergecli.evaluation.scoring import Counted, Scores, add
from mergecli.runtime.errors import UsageError, did_you_mean, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.evaluation.grid import Grid
    from mergecli.evaluation.settings import Tower

KINDS = ("logits", "probabilities", "weighted", "confidence")


@dataclass(frozen=True)
class Ensembles:
    """Which ensembles an evaluation has besides its towers; none by default."""

    kinds: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Member -> its weight, which add up to 1."""

    @property
    def names(self) -> list[str]:
        """What their results are called."""
        return [f"ensemble-{kind}" for kind in self.kinds]

    @classmethod
    def of(
        cls,
        kinds: Sequence[str] | str,
        weights: Mapping[str, float] | None,
        members: Sequence[str],
        *,
        individual: bool = False,
    ) -> Ensembles:
        """The ensembles that arguments of `evaluate` mean.

        Raises:
            UsageError: there is no such kind, there are too few members, or the weights are not theirs.
        """
        written = kinds.split(",") if isinstance(kinds, str) else kinds
        wanted = tuple(dict.fromkeys(each.strip() for each in written if each.strip()))
        for each in wanted:
            if each not in KINDS:
                near = did_you_mean(each, KINDS)
                raise UsageError(f"--ensemble: expected one of {', '.join(KINDS)}, got `{each}`{near}")
        if weights and "weighted" not in wanted:
            raise UsageError(
                "--ensemble-weight: is for the weighted ensemble", "ask for it with `--ensemble weighted`"
            )
        if not wanted:
            return cls()
        if individual:
            raise UsageError(
                "--ensemble: needs every model on every task, and does not go with --individual",
                "leave out `--individual`",
            )
        if len(members) < 2:
            raise UsageError(
                f"--ensemble: expected at least two checkpoints, got {quoted(members) or 'none'}",
                "name several; without any, the models in the recipe's `[tuned]` are meant",
            )
        equal = dict.fromkeys(members, 1 / len(members))
        return cls(wanted, _normalized(weights or {}, members) if "weighted" in wanted else equal)


def _normalized(weights: Mapping[str, float], members: Sequence[str]) -> dict[str, float]:
    """Weights that add up to 1, one for each member."""
    for name, weight in weights.items():
        if name not in members:
            near = did_you_mean(name, members)
            raise UsageError(
                f"--ensemble-weight: `{name}` is no member of the ensemble{near}",
                f"its members are {quoted(members, 30)}",
            )
        if not 0 <= weight < math.inf:
            raise UsageError(f"--ensemble-weight: `{name}`: expected a number of at least 0, got {weight:g}")
    if lacking := [name for name in members if name not in weights]:
        raise UsageError(
            f"--ensemble-weight: {quoted(lacking)}: no weight",
            f"name one for each member: `--ensemble-weight {lacking[0]}=0.5`",
        )
    total = sum(weights.values())
    if not total:
        raise UsageError("--ensemble-weight: all weights are 0", "give at least one member a greater one")
    if total == math.inf:
        raise UsageError("--ensemble-weight: the sum of the weights is infinite", "give smaller ones")
    return {name: weights[name] / total for name in members}


def combined(kind: str, logits: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """(N, C) float32 logits of an ensemble, of the (N, C) logits of its members; only two are in memory at a time.

    `logits`, `weighted`: the weighted mean of the logits. `probabilities`: the logarithm of that of the softmax.
    `confidence`: of each image those of the member whose highest probability is greatest, of equal ones the first. Equal
    weights but for `weighted`.
    """
    import torch

    found = surest = None
    members = list(weights) if kind == "weighted" else [1 / len(weights)] * len(weights)
    for each, weight in zip(logits, members, strict=True):
        own = each.double()
        if kind == "confidence":
            sure = own.softmax(1).amax(1, keepdim=True)
            better = None if surest is None else sure > surest
            found = own if found is None or better is None else torch.where(better, own, found)
            surest = sure if surest is None else torch.maximum(sure, surest)
        elif kind == "probabilities":
            own = own.log_softmax(1).add_(
                math.log(weight)
            )  # a sum of probabilities may be too small for a number
            found = own if found is None else torch.logaddexp(found, own)
        else:
            own = own.mul_(weight)
            found = own if found is None else found.add_(own)
    assert found is not None
    return found.float()


def counts_of(logits: Tensor, labels: Sequence[int], batch_size: int) -> Counts:
    """The counts of (N, C) logits, in batches as towers have them."""
    import torch

    counts, every = Counts(), torch.tensor(labels)
    for start in range(0, len(every), batch_size):
        stop = start + batch_size
        counts.add(logits[start:stop], every[start:stop])
    return counts


def ensemble_scores(
    grid: Grid, ensembles: Ensembles, towers: Mapping[str, Tower], *, predictions: bool
) -> Iterator[tuple[str, Scores, TowerFacts]]:
    """The name and the scores of each ensemble, all of whose members' units have a file, and what is known of it."""
    scoring, weights = grid.scoring, ensembles.weights
    known = [TowerFacts.of(towers[member], scoring.digests.vision, scoring.settings) for member in weights]
    for name, kind in zip(ensembles.names, ensembles.kinds, strict=True):
        scores, facts = Scores(), _facts(name, kind, weights, known)
        for task, of_task in grid.tasks.items():
            logits = (grid.logits(grid.units[member, task]) for member in weights)
            whole = combined(kind, logits, list(weights.values()))
            counts = counts_of(whole, of_task.images.labels, scoring.settings.batch_size)
            found = Counted(counts, facts, None, None)
            add(scores, of_task, found, scoring.settings, name if predictions else "")
        yield name, scores, facts


def _facts(name: str, kind: str, weights: Mapping[str, float], members: Sequence[TowerFacts]) -> TowerFacts:
    """What a result says of an ensemble, besides its scores, of what is known of its members."""
    about: dict[str, str | None] = {
        "name": name,
        "path": name,
        "digest": None,
        "kind": None,
        "method": "ensemble",
        "ensemble": kind,
    }
    if kind == "weighted":
        about["ensemble.weights"] = ", ".join(f"{member} {weight:.6g}" for member, weight in weights.items())
    pools = {each.pool for each in members}
    return TowerFacts(
        about,
        sum(each.parameters for each in members),
        sum(each.bytes for each in members),
        {each.checkpoint["name"] or "": each.checkpoint["path"] or "" for each in members},
        {task: seen for each in members for task, seen in each.looked_at.items()},
        pools.pop() if len(pools) == 1 else None,
        any(each.has_projection for each in members),
    )
