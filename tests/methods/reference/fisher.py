"""Fisher merging of whole models, in float64; the Fisher information by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.methods.reference._weights import Weights

Logits = Callable[[Tensor], Tensor]


def fisher(
    tuned: Sequence[Weights], fishers: Sequence[Weights], minimal: float = 1e-6, normalize: bool = True
) -> Weights:
    """The weighted mean of whole models; the norm of each Fisher is over all of its tensors."""
    norms = [torch.sqrt(sum((value.double() ** 2).sum() for value in each.values())) for each in fishers]
    scales = torch.stack([1 / (norm + minimal) for norm in norms])
    scales = scales / scales.sum() if normalize else torch.ones(len(fishers))
    result: Weights = {}
    for name in tuned[0]:
        weights = [c * (each[name].double() + minimal) for c, each in zip(scales, fishers, strict=True)]
        summed = sum(weight * model[name].double() for weight, model in zip(weights, tuned, strict=True))
        result[name] = (summed / sum(weights)).float()
    return result


def measured_fisher(
    model: nn.Module, logits: Logits, batches: Sequence[Tensor], per_example: bool
) -> Weights:
    """F of one model by `torch.func`: gradients of a batch's sum, or of each image by itself, squared and summed."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def score(values: Weights, pixels: Tensor) -> Tensor:
        logs = torch.func.functional_call(model, values, (lambda _: logits(pixels),)).log_softmax(1)
        return (logs.detach().exp().sqrt() * logs).sum()

    if per_example:
        batches = [image for batch in batches for image in batch.split(1)]
    found = [torch.func.grad(score)(parameters, batch) for batch in batches]
    count = sum(len(batch) for batch in batches)
    return {name: torch.stack([each[name] for each in found]).square().sum(0) / count for name in parameters}
