"""What adapted methods see of a CLIP: a merged tower whose weights they overwrite, and its slopes on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from mergecli.clip.preprocessing import Normalization
from mergecli.methods._adapted import entropy
from mergecli.methods._base import uniform
from mergecli.methods._mixture import Installed
from mergecli.runtime import interrupts
from mergecli.storage.checkpoint import VISION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels
    from mergecli.runtime.distributed import Ranks

TOGETHER = 16
"""Images that go through the tower at once: several tasks' small batches are put together."""


class Moved(Mapping[str, "Tensor"]):
    """Tensors in the machine's own memory; each look at one is a copy of it on the device, or itself if that is there."""

    def __init__(self, held: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._held, self._device = held, device

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].to(self._device, non_blocking=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True)
class Seen:
    """A task that is looked at: where it stands among the models, its images and its head."""

    place: int
    name: str
    pixels: Pixels
    head: Tensor
    """(C, D) unit vectors."""

    def rows(self, draw: int, size: int, seed: int) -> Tensor:
        """(B,) the images of batch number `draw`: all of them in random order, then all again in another, and so on;
        the last batch of a round may be smaller."""
        import torch

        each = -(-len(self.pixels) // size)
        epoch, number = divmod(draw, each)
        key = int.from_bytes(sha256(f"{seed} {self.name} {epoch}".encode()).digest()[:8], "little")
        generator = torch.Generator().manual_seed(key % (1 << 63))
        return torch.randperm(len(self.pixels), generator=generator)[number * size : (number + 1) * size]


class TowerTrial:
    """A trial on the vision tower of a CLIP; see `mergecli.methods._adapted.Trial`."""

    def __init__(
        self,
        clip: Clip,
        tasks: Sequence[str],
        base: Mapping[str, Tensor],
        deltas: Mapping[str, Tensor],
        seen: Sequence[Seen],
        size: int,
        seed: int,
        ranks: Ranks,
        installed: Installed | None = None,
        together: int = TOGETHER,
        given: Callable[[str], Tensor] | None = None,
    ) -> None:
        """`given` reads a file that the method names. `installed` are the layers of a tower that routes: their parameters are then what is learnt.

        Up to `together` images of several tasks go through the tower as one batch.
        """
        self.tasks, self.base, self.deltas = tasks, base, deltas
        self._clip, self._seen, self._size, self._seed, self._ranks = clip, seen, size, seed, ranks
        self._normalised = Normalization(clip)
        self._installed, self._together, self._given = installed, together, given
        own = {VISION + name: each for name, each in clip.tower.named_parameters()}
        found = own if installed is None else installed.parameters
        self._parameters = {name: each.requires_grad_(True) for name, each in found.items()}
        names = base if installed is None else found
        self.weights: Mapping[str, Tensor] = {name: self._parameters[name].data for name in names}
        self._routes: list[Tensor] = []

    def slopes(self, draw: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(T,) mean entropies for batch number `draw` of every task, and name -> (...) gradient of their sum."""
        import torch

        losses = torch.zeros(len(self.tasks), device=self._clip.device)
        for each in self._parameters.values():
            each.grad = None
        share = max(1, self._together // self._size)
        self._routes.clear()
        with torch.enable_grad():
            for start in range(0, len(self._seen), share):
                interrupts.check()
                self._backward(self._seen[start : start + share], draw, losses)
        grads = {name: self._parameters[name].grad for name in self.weights}
        return self.total(losses), {
            name: torch.zeros_like(self.weights[name]) if grad is None else grad
            for name, grad in grads.items()
        }

    def _backward(self, together: Sequence[Seen], draw: int, losses: Tensor) -> None:
        """Puts several tasks' batches through the tower as one, and adds their gradients to the parameters'."""
        import torch

        from mergecli.clip.model import features

        batches = [each.pixels.rows(each.rows(draw, self._size, self._seed)) for each in together]
        image = features(self._clip, self._normalised(torch.cat(batches)))  # (B, D)
        image = self._clip.model.logit_scale.exp() * image / image.norm(dim=-1, keepdim=True)
        parts = image.split([len(batch) for batch in batches])
        own = [entropy(part @ each.head.T) for each, part in zip(together, parts, strict=True)]
        torch.stack(own).sum().backward()
        if self._installed is not None:
            found = [each.mean(0) for each in self._installed.routes().values()]
            self._routes.append(torch.stack(found).mean(0) * len(together))
        for each, loss in zip(together, own, strict=True):
            losses[each.place] = loss.detach()

    def total(self, tensor: Tensor) -> Tensor:
        """(...) the sum over all processes, added in the order of their ranks."""
        return self._ranks.total(tensor)

    def given(self, key: str) -> Tensor:
        """(...) a tensor of the file that the method names, on the device."""
        assert self._given is not None
        return self._given(key).to(self._clip.device, copy=True)

    def routes(self) -> Tensor:
        """(T,) routing weights in the last step, means over layers, images and tasks."""
        import torch

        own = torch.stack(self._routes).sum(0) if self._routes else torch.zeros(len(self.tasks))
        count = self.total(torch.tensor([float(len(self._seen))], device=self._clip.device))
        return self.total(own.to(self._clip.device)) / count

    def uniform(self, name: str, label: str) -> Tensor:
        """(...) random numbers in [0, 1) for the entries of a tensor."""
        weight = self.weights[name]
        return uniform(self._seed, name, label, 0, weight.numel()).view(weight.shape).to(weight.device)
