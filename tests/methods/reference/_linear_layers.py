"""What goes into linear layers, and the weights that fit several tasks best; in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.methods.reference._weights import Weights


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
    """(O, I) the W that minimizes the sum over tasks of |x_i W^T - x_i W_i^T|^2 / n_i, as one problem of all rows."""
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
