"""Trust-region task arithmetic: every pair of tasks by itself, all entries sorted; in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.methods.reference._weights import Weights, flat, unflat


def trust_region(
    base: Weights,
    tuned: Sequence[Weights],
    scaling_factor: float,
    density: float,
    gradients: Sequence[Weights] | None = None,
) -> Weights:
    vectors = [flat(model).double() - flat(base).double() for model in tuned]
    meeting = torch.zeros_like(vectors[0])
    of_tasks = vectors if gradients is None else [flat(each).double() for each in gradients]
    for i, one in enumerate(of_tasks):
        for j, other in enumerate(vectors):
            if i != j:
                meeting += one.abs() * other.abs()
    threshold = meeting.sort().values[int(density * len(meeting)) - 1]
    kept = torch.where((meeting < threshold) | (meeting == 0), sum(vectors), 0.0)  # type: ignore[arg-type]
    return unflat((flat(base).double() + scaling_factor * kept).float(), base)


def measured_gradients(model: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> Weights:
    """The mean magnitude of each image's gradient of the cross-entropy with its prediction, by `torch.func`."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: Weights, image: Tensor) -> Tensor:
        found = torch.func.functional_call(model, values, (lambda _: logits(image),))
        return torch.nn.functional.cross_entropy(found, found.detach().argmax(1))

    found = [torch.func.grad(loss)(parameters, image) for image in images.split(1)]
    return {name: torch.stack([each[name] for each in found]).abs().mean(0) for name in parameters}
