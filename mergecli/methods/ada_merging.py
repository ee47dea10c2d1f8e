"""AdaMerging: coefficients that make the merged model sure of its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergecli.methods._base import Group, Groups, total
from mergecli.methods._coefficients import CoefficientLearner
from mergecli.methods._kth_largest import keep_largest, magnitude_thresholds
from mergecli.methods._learned import State
from mergecli.methods._settings import Fraction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaMerging(CoefficientLearner):
    """theta = theta_0 + sum_i c_i tau_i,  the c_i minimizing  sum_t mean_x H(softmax(logits_t(x; theta)))

    by `steps` steps of Adam from `start`, H the entropy, x images of task t without labels; with
    `granularity = "layer"` one coefficient for each task and tensor. With `preprocess = "ties"` (AdaMerging++) the tau_i
    are those entries that survive TIES's trimming and agree with its elected sign.

    The published tables took batches of the test images; `split` takes others.
    """

    title: ClassVar[str] = "coefficients learned by making predictions on unlabeled images sure"
    published = "{granularity}-wise AdaMerging"
    paper: ClassVar[str] = "Yang et al., AdaMerging, ICLR 2024, arXiv 2310.02575, equations 4 to 6"
    also_called: ClassVar[Mapping[str, str]] = {
        "layer_wise_adamerging": "",
        "task_wise_adamerging": "granularity=task",
    }

    preprocess: Literal["none", "ties"] = "none"
    """Whether the task vectors are first trimmed and freed of disagreeing entries as TIES does."""
    density: Fraction = 0.2
    """With `preprocess = "ties"`: the fraction of entries kept of each task vector."""

    def survey(self, groups: Groups, /) -> State:
        if self.preprocess == "none":
            return {}
        import torch

        thresholds = magnitude_thresholds(groups, self.density)[""]  # infinity where nothing is kept
        return {"thresholds": thresholds.clamp_(max=torch.finfo(torch.float32).max)}

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        if self.preprocess == "none":
            return group.deltas
        trimmed = keep_largest(group.deltas, surveyed["thresholds"].to(group.deltas.device))
        sign = total(trimmed).sign_()
        return trimmed.mul_((trimmed * sign) > 0)

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        thresholds: dict[str, tuple[int, ...]] = {"thresholds": (tasks,)} if self.preprocess == "ties" else {}
        return super().file_shapes(tasks, tensors) | thresholds
