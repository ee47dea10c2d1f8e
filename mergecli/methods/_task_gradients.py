"""Magnitudes of the gradients of the base's loss, on images of each task without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergecli.methods._calibrated import Calibrated, Layout, Probe, Shapes

if TYPE_CHECKING:
    from torch import Tensor

GRADIENT = ".gradient"
"""What the name of a tensor's magnitudes has at its end."""


@dataclass(frozen=True)
class TaskGradients(Calibrated):
    """g = (1 / N) sum_x |grad of cross-entropy of the logits of x, and of the class that they predict|  in the base"""

    measured_as: ClassVar[str] = "trust_region"
    of_base: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True
    title: ClassVar[str] = "magnitudes of gradients on each task's images"
    paper: ClassVar[str] = "Sun et al., Task arithmetic in trust region, ICLR 2025, arXiv 2501.15065"

    examples: int = 128

    def layout(self, shapes: Shapes, /) -> Layout:
        return {f"{name}{GRADIENT}": ("F32", shape) for name, shape in shapes.items()}

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        import torch

        probe.model.requires_grad_(True)
        parameters = dict(probe.model.named_parameters())
        sums = {name: torch.zeros_like(each, requires_grad=False) for name, each in parameters.items()}
        images = 0
        for batch in probe.batches(1):  # the gradient of each image by itself
            logits = probe.logits(batch)
            torch.nn.functional.cross_entropy(logits, logits.argmax(1)).backward()
            for name, each in parameters.items():
                if each.grad is not None:
                    sums[name].add_(each.grad.abs_())
                    each.grad = None
            images += len(batch)
        for name, each in sums.items():
            yield f"{name}{GRADIENT}", each.div_(images)
