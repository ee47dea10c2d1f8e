"""TIES: trim each task vector, elect a sign for each entry, and add what agrees with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from mergecli.methods._base import Group, Groups, TwoPass, total
from mergecli.methods._continual import START, Chain, ScaledVector, Step
from mergecli.methods._kth_largest import keep_largest, magnitude_thresholds
from mergecli.methods._settings import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(NamedTuple):
    """What TIES knows of the whole model before it merges a tensor."""

    thresholds: dict[str, Tensor]
    """Tensor's name -> (T,) smallest magnitude kept; under "" if one threshold serves the whole model."""
    majority_sign: float
    """The sign of entries whose kept values cancel: -1, 0 or 1."""


@dataclass(frozen=True)
class Ties(ScaledVector, TwoPass):
    """theta = theta_0 + lambda tau,  entry by entry:

    trim       t_i = tau_i where |tau_i| is among the largest `density` of its task vector, else 0
    elect      s = sign(sum_i t_i)
    aggregate  tau = sum, mean or max of the t_i whose sign is s

    Entries that tie with the smallest kept magnitude are kept: of models in half precision a percent or so more than
    `density`. The published tables used `trim = "fusion_bench"` and `zero_sign = "majority"`; the difference is at most
    one entry a task vector, and entries that cancel exactly.
    With `trim = "tensor"` a tensor of few entries may lose all of them. The paper takes the mean: `aggregate = "mean"`, with a scaling factor about 1.

    In a chain a step merges the tau of the steps before, as if it were one task vector, and the new one. So the second step gives
    the bytes of a merge of two; later ones differ from a merge of all.
    """

    title: ClassVar[str] = "task vectors trimmed, a sign elected for each entry, the agreeing ones added"
    published = "Ties-Merging"
    paper: ClassVar[str] = "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708, algorithm 1"
    why_not_without: ClassVar[str] = (
        "signs were elected and entries trimmed with it, and what lost is not remembered"
    )

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda; 0 gives the base back."""
    density: Fraction = 0.2
    """Fraction of entries kept of each task vector, and whatever ties with the smallest of them; 1 keeps all."""
    aggregate: Literal["sum", "mean", "max"] = "sum"
    """How agreeing entries are put together: their sum (as published in FusionBench's tables), their mean (as in
    the paper) or the one of largest magnitude."""
    trim: Literal["model", "tensor", "fusion_bench"] = "model"
    """Over what the largest entries are taken: the whole task vector (as in the paper), each tensor by itself (as
    mergekit and PEFT do; reads the models once more), or the whole task vector with the one entry more that FusionBench keeps."""
    zero_sign: Literal["zero", "majority"] = "zero"
    """What becomes of an entry whose kept values cancel exactly: 0 (the paper's formula), or those values that have
    the sign elected by most other entries (the authors' code and FusionBench; reads the models once more)."""

    def survey(self, groups: Groups, /) -> Surveyed:
        thresholds = magnitude_thresholds(
            groups,
            self.density,
            each_tensor=self.trim == "tensor",
            one_more=self.trim == "fusion_bench",
        )
        majority = 0.0
        if self.zero_sign == "majority":
            balance = sum(
                groups.map(
                    lambda group: float(total(self._trimmed(group, thresholds)).sign_().double().sum())
                )
            )
            majority = float((balance > 0) - (balance < 0)) or -1.0
        return Surveyed(thresholds, majority)

    def survey_step(self, groups: Groups, chain: Chain, /) -> Surveyed:
        del chain
        return self.survey(groups)

    def merge(self, group: Group, surveyed: Surveyed, /) -> Tensor:
        return self.whole(Step(group, START, surveyed))

    def remember(self, step: Step, /) -> Tensor:
        trimmed = self._trimmed(step.group, step.surveyed.thresholds)  # (T, ...) trim
        sign = total(trimmed).sign_()  # (...) elect
        if majority := step.surveyed.majority_sign:
            sign.masked_fill_(sign == 0, majority)
        agreeing = trimmed.mul_(sign).clamp_(min=0)  # (T, ...) magnitudes of the entries that agree, else 0
        # aggregate
        if self.aggregate == "max":
            merged = agreeing.amax(0)
        else:
            merged = total(agreeing)
            if self.aggregate == "mean":
                merged /= (agreeing > 0).sum(0).clamp_(min=1)
        return merged.mul_(sign)

    def _trimmed(self, group: Group, thresholds: dict[str, Tensor]) -> Tensor:
        """(T, ...) the task vectors with all but their largest entries set to 0."""
        return keep_largest(group.deltas, thresholds[group.name if self.trim == "tensor" else ""])
