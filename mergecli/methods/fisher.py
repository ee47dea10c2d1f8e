"""Fisher merging: weights that move a model's outputs much count for more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, total
from mergecli.methods._calibrated import Calibrated, Layout, Probe, Shapes, Statistics
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

PART = 8
"""Images whose activations are held at a time; a batch's gradient is the sum of its parts'."""

SQUARES = "squares"
"""(L,) float64 sums of the squares of every tensor's F, in the order of the tensors' names."""


@dataclass(frozen=True)
class Fisher(Calibrated):
    """theta = sum_i c_i (F_i + eps) theta_i / sum_i c_i (F_i + eps),  entry by entry

    F_i = (1 / N) sum_b g_b^2,  g_b = grad of sum_{x in b} sum_c sqrt(p_c(x)) log p_c(x), sqrt(p) held fixed
    c_i = 1 / (|F_i| + eps), the norm over all merged tensors; c_i = 1 without `normalize`

    N images in batches b, p the softmax of the zero-shot logits of model i on its own task. This is what made the
    published tables. The paper's diagonal Fisher squares the gradient of each example, and of each class, before it
    sums; `per_example` does the former. With `shuffle` off, as published, the first images are taken as they are
    stored: of data that are sorted by class these show a few classes only, and F knows nothing of the others.
    Where all F_i + eps are 0 the plain mean is taken.
    """

    title: ClassVar[str] = "the mean weighted by each model's Fisher information"
    published = "Fisher Merging"
    paper: ClassVar[str] = "Matena & Raffel, NeurIPS 2022, arXiv 2111.09832"
    also_called: ClassVar[Mapping[str, str]] = {"clip_fisher": ""}
    needs_head: ClassVar[bool] = True
    merge_time: ClassVar[frozenset[str]] = Calibrated.merge_time | {"normalize", "minimal"}

    shuffle: bool = False
    """Whether the images are drawn by the recipe's seed; off, the first ones are taken as they are stored."""
    per_example: bool = False
    """Whether each image's gradient is squared by itself, or the sum of a batch's, as published."""
    normalize: bool = True
    """Whether each model's F is divided by its norm, so that all models count alike on the whole."""
    minimal: Annotated[float, Range(0)] = 1e-6
    """eps, added to every F; the larger it is, the nearer the result is to the plain mean."""

    def layout(self, shapes: Shapes, /) -> Layout:
        fishers = {f"{name}.fisher": ("F32", shape) for name, shape in shapes.items()}
        return fishers | {SQUARES: ("F64", (len(shapes),))}

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        import torch

        probe.model.requires_grad_(True)
        parameters = dict(probe.model.named_parameters())
        sums = {name: torch.zeros_like(each, requires_grad=False) for name, each in parameters.items()}
        images = 0
        for batch in probe.batches(1 if self.per_example else self.batch_size):
            for part in batch.split(PART):
                logs = probe.logits(part).log_softmax(dim=1)
                (logs.detach().exp().sqrt() * logs).sum().backward()
            for name, each in parameters.items():
                if each.grad is not None:
                    sums[name].addcmul_(each.grad, each.grad)
                    each.grad = None
            images += len(batch)
        for name, each in sums.items():
            yield f"{name}.fisher", each.div_(images)
        yield SQUARES, torch.stack([sums[name].double().square().sum() for name in sorted(sums)])

    def merge(self, group: Group, learned: Statistics, /) -> Tensor:
        import torch

        if self.excludes(group.name):
            return group.base.clone()
        start, stop = group.start, group.start + group.shape.numel()
        weights = torch.stack(
            [
                learned.read(task, f"{group.name}.fisher", start, stop).double().view(group.shape)
                for task in range(group.tasks)
            ]
        )  # (T, ...)
        weights += self.minimal
        for row, norm in zip(weights, self._norms(learned, group.tasks), strict=True):
            row /= norm
        weights[:, total(weights) == 0] = 1.0
        return (total(weights * group.tuned) / total(weights)).float()

    def _norms(self, learned: Statistics, tasks: int) -> list[float]:
        """What each task's F + eps is divided by."""
        if not self.normalize:
            return [1.0] * tasks
        names = sorted(name.removesuffix(".fisher") for name in learned.names if name != SQUARES)
        kept = [number for number, name in enumerate(names) if not self.excludes(name)]
        squares = [learned.read(task, SQUARES)[kept].sum() for task in range(tasks)]
        return [float(each.sqrt()) + self.minimal or 1.0 for each in squares]
