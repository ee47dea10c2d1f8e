"""WEMoE: a tower whose multilayer perceptrons are put together for each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mergecli.methods._wemoe import WeightEnsembling


@dataclass(frozen=True)
class WeightEnsemblingMoe(WeightEnsembling):
    """theta = theta_0 + sum_i l_i tau_i in the MLPs,  theta_0 + lambda sum_i tau_i elsewhere

    l = mean over the tokens h of r(h),  r(h) = A_2 relu(A_1 h + b_1) + b_2

    one router r a layer, h what the layer's MLP gets. The routers minimize the mean entropy of predictions on unlabeled
    images, by Adam.

    A routing weight of 1 for one task gives that task's MLPs; elsewhere the tower is that of all tasks still.

    The published tables took one l for a whole batch of images of one task, which tells the model the task; here each
    image has its own unless evaluation is asked for `routing = "batch"`.
    """

    title: ClassVar[str] = "layers put together for each image by routers learned on unlabeled images"
    published = "Weight-Ensembling MoE"
    paper: ClassVar[str] = (
        "Tang et al., Weight-ensembling mixture of experts, ICML 2024, arXiv 2402.00433, section 3"
    )
    also_called: ClassVar[Mapping[str, str]] = {"wemoe": "", "we_moe": ""}
