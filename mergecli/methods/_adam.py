"""Adam, for methods that minimize a function of one matrix whose gradient is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mergecli.runtime import interrupts

if TYPE_CHECKING:
    from torch import Tensor

_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.999, 1e-8


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], learning_rate: float, steps: int) -> Tensor:
    """(...) what `steps` steps of Adam from `start`, which is overwritten, lead to."""
    import torch

    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        interrupts.check()
        adam_step(start, gradient(start), mean, square, learning_rate, step)
    return start


def adam_step(
    at: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, learning_rate: float, step: int
) -> None:
    """Step number `step`, from 1, of Adam (Kingma and Ba, arXiv 1412.6980): changes `at` and the moments."""
    mean.lerp_(gradient, 1 - _DECAY)
    square.mul_(_SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - _SQUARE_DECAY)
    size = (square / (1 - _SQUARE_DECAY**step)).sqrt_().add_(_TINY)
    at.addcdiv_(mean, size, value=-learning_rate / (1 - _DECAY**step))
