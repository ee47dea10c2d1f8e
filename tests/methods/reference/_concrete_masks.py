"""Concrete masks of whole models: all of their entries drawn at once; in float64."""

from __future__ import annotations

import torch

from tests.methods.reference._random_numbers import uniform
from tests.methods.reference._weights import Weights


def sampled(logits: Weights, label: str, temperature: float) -> Weights:
    """Rescaled samples of the concrete distribution."""
    eps = torch.finfo(torch.float32).eps
    masks: Weights = {}
    for name, phi in logits.items():
        u = uniform(name, label, phi).clamp(eps, 1 - eps).double()
        mask = torch.sigmoid((torch.log(u) - torch.log(1 - u) + phi) / temperature)
        masks[name] = mask / mask.mean()
    return masks


def kept(logits: Weights, temperature: float, kind: str) -> Weights:
    if kind == "sample":
        return sampled(logits, "final mask", temperature)
    masks = {name: torch.sigmoid(phi) for name, phi in logits.items()}
    if kind == "discrete":
        masks = {name: (uniform(name, "final mask", m) < m).double() for name, m in masks.items()}
    return {name: mask / mask.mean() if mask.any() else mask for name, mask in masks.items()}


def zeros(base: Weights, initial: float) -> Weights:
    return {
        name: torch.full_like(value, initial, dtype=torch.float64).requires_grad_()
        for name, value in base.items()
    }
