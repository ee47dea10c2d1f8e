"""A tower under the names that its tensors have in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Called(nn.Module):
    """A tower that does what it is told, so that `functional_call` reaches it by its checkpoint's names."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_model = tower

    def forward(self, work: Callable[[nn.Module], Tensor]) -> Tensor:
        return work(self.vision_model)
