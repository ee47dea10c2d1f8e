"""The base and the scaled sum of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def task_arithmetic(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    return {
        name: value + scaling_factor * torch.stack([model[name] - value for model in tuned]).sum(0)
        for name, value in floats(base).items()
    }
