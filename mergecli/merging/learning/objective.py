"""What methods that adapt minimize: the loss of a merged tower's predictions on unlabeled images, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from mergecli.clip.preprocessing import Normalization
from mergecli.merging.learning.experts import ExpertLabels, expert_labels
from mergecli.merging.learning.work import LearningWork
from mergecli.merging.models import Models
from mergecli.methods._adapted import Adapted, entropy, expert_loss
from mergecli.methods._base import Group, Unit, uniform
from mergecli.methods._learned import State
from mergecli.methods._mixture import Installed, Routed
from mergecli.runtime import interrupts
from mergecli.storage.cache import allowed_size
from mergecli.storage.checkpoint import PROJECTION, VISION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels
    from mergecli.runtime.distributed import Ranks

TOGETHER = 16
"""Images that go through the tower at once: several tasks' small batches are put together."""


class OffloadedTensors(Mapping[str, "Tensor"]):
    """Tensors in main memory; reading one copies it to the device, unless it is there already."""

    def __init__(self, held: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._held, self._device = held, device

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].to(self._device, non_blocking=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True)
class TaskBatches:
    """The batches of one task: its images in random order, and its zero-shot head."""

    index: int
    """Which of the models it is."""
    name: str
    pixels: Pixels
    head: Tensor
    """(C, D) unit vectors."""
    expert: ExpertLabels | None = None
    """What the task's own model predicts; None where the loss is the entropy."""

    def rows(self, batch: int, size: int, seed: int) -> Tensor:
        """(B,) the images of batch number `batch`: every epoch takes all of them, in an order of its own; the last batch
        of an epoch may be smaller."""
        import torch

        each = -(-len(self.pixels) // size)
        epoch, number = divmod(batch, each)
        key = int.from_bytes(sha256(f"{seed} {self.name} {epoch}".encode()).digest()[:8], "little")
        generator = torch.Generator().manual_seed(key % (1 << 63))
        return torch.randperm(len(self.pixels), generator=generator)[number * size : (number + 1) * size]


class TowerObjective:
    """The `Objective` of methods that adapt, on the vision tower of a CLIP."""

    def __init__(
        self,
        clip: Clip,
        tasks: Sequence[str],
        base: Mapping[str, Tensor],
        deltas: Mapping[str, Tensor],
        batches: Sequence[TaskBatches],
        size: int,
        seed: int,
        ranks: Ranks,
        installed: Installed | None = None,
        read_mask: Callable[[str], Tensor] | None = None,
        looked_at: Sequence[int] = (),
        heads: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """The objective of tasks whose models have these weights.

        Args:
            batches: of the tasks that this process looks at.
            size: images of a batch.
            installed: the layers of a tower that routes: their parameters are then what is learned.
            read_mask: reads the file of masks that the method needs.
            looked_at: the places of the tasks that all processes together look at.
            heads: of these tasks, where heads are learned.
        """
        import torch

        self.tasks, self.base, self.deltas = tasks, base, deltas
        self._clip, self._batches, self._size, self._seed, self._ranks = clip, batches, size, seed, ranks
        self._normalized = Normalization(clip)
        self._installed, self._read_mask = installed, read_mask
        # tasks whose images share routing weights must not be in one batch
        self._together = size if installed and installed.keeps_batches_whole else TOGETHER
        own: dict[str, Tensor] = {VISION + name: each for name, each in clip.tower.named_parameters()}
        if PROJECTION in base:
            own[PROJECTION] = clip.model.visual_projection.weight
        found = own if installed is None else installed.parameters
        self._parameters = {name: each.requires_grad_(True) for name, each in found.items()}
        names = base if installed is None else found
        self.weights: Mapping[str, Tensor] = {name: self._parameters[name].data for name in names}
        self._routes: list[Tensor] = []
        self._looked_at, self.heads = looked_at, heads or {}
        for each in (each for head in self.heads.values() for each in head):
            each.requires_grad_(True)
        # a head that is learned has the logit scale in it
        scale = clip.model.logit_scale.exp()
        self._scale = torch.ones_like(scale) if self.heads else scale

    def order(self, number: int) -> list[int]:
        """The places of the tasks that are looked at, in an order of round `number`."""
        drawn = uniform(self._seed, "order of tasks", f"round {number}", 0, len(self._looked_at))
        return [self._looked_at[each] for each in drawn.argsort(stable=True).tolist()]

    def head_gradients(self, place: int) -> tuple[Tensor, Tensor]:
        """(C, D) and (C,) the gradient with respect to a task's head, which one of the processes has."""
        import torch

        weight, bias = (
            self.total(torch.zeros_like(each) if each.grad is None else each.grad)
            for each in self.heads[place]
        )
        return weight, bias

    def losses_and_gradients(
        self, batch: int, places: Sequence[int] | None = None, factors: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(T,) mean losses on batch number `batch` of every task, or of some, and name -> (...) gradient of their sum, each
        times its factor."""
        import torch

        losses = torch.zeros(len(self.tasks), device=self._clip.device)
        heads = (each for head in self.heads.values() for each in head)
        for each in (*self._parameters.values(), *heads):
            each.grad = None
        wanted = [each for each in self._batches if places is None or each.index in places]
        share = max(1, self._together // self._size)
        self._routes.clear()
        with torch.enable_grad():
            for start in range(0, len(wanted), share):
                interrupts.check()
                self._backward(wanted[start : start + share], batch, losses, factors)
        grads = {name: self._parameters[name].grad for name in self.weights}
        return self.total(losses), {
            name: torch.zeros_like(self.weights[name]) if grad is None else grad
            for name, grad in grads.items()
        }

    def _backward(
        self, together: Sequence[TaskBatches], batch: int, losses: Tensor, factors: Tensor | None
    ) -> None:
        """Puts several tasks' batches through the tower as one, and adds their gradients to the parameters'."""
        import torch

        from mergecli.clip.model import features

        chosen = [each.rows(batch, self._size, self._seed) for each in together]
        batches = [each.pixels.rows(rows) for each, rows in zip(together, chosen, strict=True)]
        image = features(self._clip, self._normalized(torch.cat(batches)))  # (B, D)
        image = self._scale * image / image.norm(dim=-1, keepdim=True)
        parts = image.split([len(batch) for batch in batches])
        own = [
            _loss(self._logits(part, each), each, rows)
            for each, part, rows in zip(together, parts, chosen, strict=True)
        ]
        stacked = torch.stack(own)
        if factors is not None:
            stacked = stacked * factors[[each.index for each in together]]
        stacked.sum().backward()
        if self._installed is not None:
            found = [each.mean(0) for each in self._installed.routes().values()]
            self._routes.append(torch.stack(found).mean(0) * len(together))
        for each, loss in zip(together, own, strict=True):
            losses[each.index] = loss.detach()

    def _logits(self, image: Tensor, task: TaskBatches) -> Tensor:
        """(B, C) logits of (B, D) unit features times the scale."""
        import torch

        head = self.heads.get(task.index)
        return image @ task.head.T if head is None else torch.nn.functional.linear(image, *head)

    def total(self, tensor: Tensor) -> Tensor:
        """(...) the sum over all processes, added in the order of their ranks."""
        return self._ranks.total(tensor)

    def mask(self, key: str) -> Tensor:
        """(...) a tensor of the file of masks, on the device."""
        assert self._read_mask is not None
        return self._read_mask(key).to(self._clip.device, copy=True)

    def routes(self) -> Tensor:
        """(T,) routing weights in the last step, means over layers, images and tasks."""
        import torch

        own = torch.stack(self._routes).sum(0) if self._routes else torch.zeros(len(self.tasks))
        count = self.total(torch.tensor([float(len(self._batches))], device=self._clip.device))
        return self.total(own.to(self._clip.device)) / count

    def drawn(self, label: str, count: int) -> Tensor:
        """(count,) random numbers in [0, 1) for a label."""
        return uniform(self._seed, "", label, 0, count)

    def uniform(self, name: str, label: str) -> Tensor:
        """(...) random numbers in [0, 1) for the entries of a tensor."""
        weight = self.weights[name]
        return uniform(self._seed, name, label, 0, weight.numel()).view(weight.shape).to(weight.device)


def _loss(logits: Tensor, task: TaskBatches, rows: Tensor) -> Tensor:
    """() the loss of (B, C) logits of some of a task's images."""
    if task.expert is None:
        return entropy(logits)
    labels, confidences = (each[rows].to(logits.device) for each in task.expert)
    return expert_loss(logits, labels, confidences)


def tower_objective(
    work: LearningWork, method: Adapted, surveyed: State, ranks: Ranks, device: str
) -> TowerObjective:
    """The objective with everything that it needs in memory: a CLIP, heads, and base and task vectors or routers.

    Raises:
        InputError: the base and the models do not fit together.
    """
    models, clip = work.models, work.load_clip()
    clip.model.to(device)
    own = [name for number, name in enumerate(work.tasks) if number % ranks.count == ranks.own]
    batches = _task_batches(work, method, clip, own)
    heads = _learned_heads(work, clip) if method.learns_heads else {}
    clip.drop_text_tower()
    if method.objective == "experts":
        batches = [
            replace(each, expert=expert_labels(work, clip, each.name, each.pixels, each.head))
            for each in batches
        ]
    tasks, size, seed = list(models.tuned), method.batch_size, work.recipe.seed
    if isinstance(method, Routed):
        installed = _installed(models, method, clip, device)
        return TowerObjective(clip, tasks, {}, {}, batches, size, seed, ranks, installed)
    base, deltas = _prepared(models, method, surveyed, device)
    masks = work.needed.get("masks")
    read = masks.read if masks else None
    looked_at = [tasks.index(name) for name in work.tasks]
    return TowerObjective(
        clip, tasks, base, deltas, batches, size, seed, ranks, None, read, sorted(looked_at), heads
    )


def _prepared(
    models: Models, method: Adapted, surveyed: State, device: str
) -> tuple[dict[str, Tensor], OffloadedTensors]:
    """Name -> (...) weights of the base, and (T, ...) task vectors as the method prepares them."""
    import torch

    base: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    dtype, where = getattr(torch, method.vectors), method.vectors_on or device

    def look(_: int, group: Group) -> tuple[str, Tensor, Tensor]:
        vectors = method.prepared(group, surveyed)
        return group.name, group.base.to(device, copy=True), vectors.to(where, dtype, copy=True)

    for name, own, vectors in models.map(look, unit=Unit.TENSOR):
        pin = where == "cpu" and device.startswith("cuda")  # else copies would wait for each other
        base[name], deltas[name] = own, vectors.pin_memory() if pin else vectors
    return base, OffloadedTensors(deltas, device)


def _installed(models: Models, method: Routed, clip: Clip, device: str) -> Installed:
    """Puts the tower that routes into the CLIP; its routers' weights are 0 still."""
    import torch

    parts: dict[str, Tensor] = {}

    def look(_: int, group: Group) -> dict[str, Tensor]:
        return {key: each.to(device, copy=True) for key, each in method.expand(group, None).items()}

    for found in models.map(look, unit=Unit.TENSOR):
        parts |= found
    for key, part in method.extras(models.shapes, len(models.tuned)).items():
        parts[key] = torch.zeros(part.shape, device=device)
    for name, tensor in clip.tower.state_dict().items():
        tensor.copy_(parts.pop(VISION + name))
    if PROJECTION in parts:
        clip.model.visual_projection.weight.data.copy_(parts.pop(PROJECTION))
    return method.install_to_learn(clip.tower, parts.__getitem__, tuple(models.tuned), VISION)


def _learned_heads(work: LearningWork, clip: Clip) -> dict[int, tuple[Tensor, Tensor]]:
    """Place of a task -> weights and biases with which its head begins: the zero-shot head times the logit scale, and 0."""
    from mergecli.clip.heads import cached_head

    tasks, size, scale = list(work.models.tuned), allowed_size(), clip.model.logit_scale.exp().detach()
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for name, task in work.tasks.items():
        head = cached_head(clip, task.classes, task.templates, work.clip_digests.text, size)
        weight = (scale * head).detach().clone()
        found[tasks.index(name)] = weight, weight.new_zeros(len(weight))
    return found


def _task_batches(work: LearningWork, method: Adapted, clip: Clip, names: Sequence[str]) -> list[TaskBatches]:
    """The images and heads of some of the tasks."""
    from mergecli.clip.heads import cached_head
    from mergecli.clip.pixels import Processing, cached_pixels, stored_pixels

    tasks, size = list(work.models.tuned), allowed_size()
    text = work.clip_digests.text
    found: list[TaskBatches] = []
    for name in names:
        task = work.tasks[name]
        assert task.images is not None
        how = Processing(max_size=size)
        few = 4 * method.total_steps * method.batch_size < len(task.images)
        if few and stored_pixels(clip, task.images, how) is None:
            how = Processing()  # decoding all images for the cache would take longer than the steps
        head = cached_head(clip, task.classes, task.templates, text, size)
        pixels = cached_pixels(clip, task.images, how)
        found.append(TaskBatches(tasks.index(name), name, pixels, head))
    return found
