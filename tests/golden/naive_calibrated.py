"""The methods that measure on images as their papers and FusionBench write them: whole models, no cleverness, float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
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


class Called(nn.Module):
    """A tower that does what it is told, so that `functional_call` reaches it by its checkpoint's names."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_model = tower

    def forward(self, work: Callable[[nn.Module], Tensor]) -> Tensor:
        return work(self.vision_model)


def inputs_of(model: nn.Module, run: Callable[[], object]) -> Weights:
    """(rows, I) float64 everything that goes into each linear layer while `run` runs."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        each.register_forward_hook(
            lambda _, inputs, __, name=name: seen.setdefault(name, []).append(
                inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            )
        )
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": torch.cat(rows) for name, rows in seen.items()}


def least_squares(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """(O, I) the W that minimises the sum over tasks of |x_i W^T - x_i W_i^T|^2 / n_i, as one problem of all rows."""
    rows = torch.cat([x / len(x) ** 0.5 for x in inputs])
    wanted = torch.cat([x @ w.double().T / len(x) ** 0.5 for x, w in zip(inputs, weights, strict=True)])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


def closed_form(
    weights: Sequence[Tensor], inputs: Sequence[Tensor], alpha: float, ridge: float = 0.0
) -> Tensor:
    """(O, I) the published formula, with an inverse."""
    grams = [x.T @ x / len(x) for x in inputs]
    middle = sum(gram.diagonal().mean() for gram in grams) / len(grams)
    shrunk = [
        alpha * gram + (1 - alpha) * gram.diagonal().diag() + ridge * middle * torch.eye(len(gram)).double()
        for gram in grams
    ]
    summed = sum(gram @ w.double().T for gram, w in zip(shrunk, weights, strict=True))
    return (torch.linalg.inv(sum(shrunk)) @ summed).T


def reg_mean(
    tuned: Sequence[Weights], inputs: Sequence[Weights], alpha: float, ridge: float = 0.0
) -> Weights:
    """Linear layers by the closed form, the rest by the mean."""
    return {
        name: closed_form(
            [model[name] for model in tuned], [each[name] for each in inputs], alpha, ridge
        ).float()
        if name in inputs[0]
        else sum(model[name] for model in tuned) / len(tuned)  # type: ignore[misc]
        for name in tuned[0]
    }


def reg_mean_plus_plus(
    tower: nn.Module, tuned: Sequence[Weights], pixels: Sequence[Tensor], alpha: float
) -> Weights:
    """Each layer by RegMean on the inputs it has in a whole model: the layers before it merged, itself of the task."""
    merged = {name: sum(model[name] for model in tuned) / len(tuned) for name in tuned[0]}  # type: ignore[misc]
    count = len(tower.encoder.layers)  # type: ignore[union-attr]
    for number in range(count):
        own = [name for name in merged if f".layers.{number}." in name]
        inputs: list[Weights] = []
        for model, images in zip(tuned, pixels, strict=True):
            called = Called(copy.deepcopy(tower))
            called.load_state_dict(merged | {name: model[name] for name in own})
            found = inputs_of(called, lambda called=called, images=images: called.vision_model(images))
            inputs.append({name: found[name] for name in own if name in found})
        merged |= {
            name: closed_form(
                [model[name] for model in tuned], [each[name] for each in inputs], alpha
            ).float()
            for name in inputs[0]
        }
    return merged
