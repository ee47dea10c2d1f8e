"""Task vectors written as codes of a few bits: each by itself (TVQ), or as residuals to their mean (RTVQ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.formats.mixture import mixture_of
from mergecli.formats.quantized import KEY, SHARED, Scheme, shared_path, tensors_of
from mergecli.formats.quantizer import Per, Quantized, Steps, dequantize, quantize
from mergecli.merging.models import BLOCK, Models
from mergecli.methods._base import Group, Unit, total
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import check_space, expect_finite
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.metadata import UNKNOWN_DIGEST
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES, layout_size
from mergecli.storage.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor

FINER = {2: 3, 3: 4, 4: 8, 8: 8}
"""Bits of residuals -> those of the mean that they share: as there is one for all of them, a bit more costs little. With
2 it is the paper's RTVQ of 3 and 2 bits."""

Layout = dict[str, tuple[str, tuple[int, ...]]]

Describe = Callable[[str, Mapping[str, str]], dict[str, str]]
"""`describe(model, digests of the inputs)` is the metadata of a model's file, or with "" of what all share."""


@dataclass(frozen=True)
class Loss:
    """What quantization lost of a task vector."""

    square: float = 0.0
    """The squared norm of the task vector."""
    lost: float = 0.0
    """That of what is lost."""
    largest: float = 0.0
    """The largest error of an entry."""

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.square + other.square, self.lost + other.lost, max(self.largest, other.largest))

    @property
    def error(self) -> float:
        """|lost| / |task vector|, Frobenius norms; 0 of a task vector of zeros."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0

    def metadata(self) -> dict[str, str]:
        """Always of one length, as a header's place is kept before the loss is known."""
        return {"error": f"{self.error:.6e}", "largest_error": f"{self.largest:.6e}"}

    @classmethod
    def of(cls, delta: Tensor, kept: Tensor) -> Loss:
        """Of one tensor, in pieces, as sums of float64 take room."""
        loss = cls()
        for one, other in zip(delta.flatten().split(BLOCK), kept.flatten().split(BLOCK), strict=True):
            exact = one.double()
            lost = exact - other.double()
            largest = float(lost.abs().max()) if lost.numel() else 0.0
            loss += cls(float(exact.square().sum()), float(lost.square().sum()), largest)
        return loss


@dataclass(frozen=True)
class Quantization:
    """How task vectors are quantized."""

    bits: int
    per: Per
    residual: bool = False
    """Whether they are residuals to their mean, which is quantized too."""
    dtype: str = "float32"
    """Of tensors that are not quantized."""

    def layout(self, models: Models) -> tuple[Scheme, Layout]:
        """Which tensors are quantized, and how a file with them is laid out."""
        scheme, kind = Scheme.of(self.bits, self.per, models.shapes), SAFETENSORS_NAMES[self.dtype]
        whole = {name: (kind, shape) for name, shape in models.shapes.items() if name not in scheme.shapes}
        return scheme, whole | scheme.layout()

    def sizes(self, models: Models, targets: Mapping[str, Path]) -> dict[Path, int]:
        """Path -> bytes of what is written."""
        scheme, layout = self.layout(models)
        sizes = dict.fromkeys(targets.values(), layout_size(layout))
        if self.residual:
            sizes[self.shared(targets)] = layout_size(self._finer(scheme).layout())
        return sizes

    def shared(self, targets: Mapping[str, Path]) -> Path:
        """Where the mean is written."""
        return shared_path(next(iter(targets.values())).parent)

    def _finer(self, scheme: Scheme) -> Scheme:
        return replace(scheme, bits=FINER[self.bits])

    def write(
        self, models: Models, targets: Mapping[str, Path], describe: Describe, report: Progress | None
    ) -> dict[str, Loss]:
        """Writes the file of each model, and gives what each lost. Every model is read once: residuals all together, others
        one after the other. Held in memory is one tensor of each of those."""
        if self.residual:
            return self._write(models, targets, describe, report)
        found: dict[str, Loss] = {}
        for name, path in targets.items():
            one = replace(models, tuned={name: models.tuned[name]})
            found |= self._write(one, {name: path}, describe, report)
        return found

    def _write(
        self, models: Models, targets: Mapping[str, Path], describe: Describe, report: Progress | None
    ) -> dict[str, Loss]:
        scheme, layout = self.layout(models)
        finer, losses = self._finer(scheme), dict.fromkeys(targets, Loss())
        unknown = dict.fromkeys(models.read, UNKNOWN_DIGEST)

        def about_one(name: str, digests: Mapping[str, str], shared: str) -> dict[str, str]:
            beside = {"file": "/".join(self.shared(targets).parts[-2:]), "digest": shared}
            own = replace(scheme, shared=beside) if self.residual else scheme
            return describe(name, digests) | {KEY: own.to_json()} | losses[name].metadata()

        def about_mean(digests: Mapping[str, str]) -> dict[str, str]:
            return describe("", digests) | {"kind": SHARED, KEY: finer.to_json()}

        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    SafetensorsWriter(path, layout, about_one(name, unknown, UNKNOWN_DIGEST))
                )
                for name, path in targets.items()
            }
            shared = ""
            with ExitStack() as mean_stack:
                mean = None
                if self.residual:
                    mean = SafetensorsWriter(self.shared(targets), finer.layout(), about_mean(unknown))
                    mean_stack.enter_context(mean)
                work = _Work(scheme, finer, self.dtype, writers, mean)
                for number, found in enumerate(models.map(work.on, unit=Unit.TENSOR)):
                    losses |= {name: losses[name] + loss for name, loss in found.items()}
                    if report:
                        report(f"quantizing {', '.join(targets)}", number + 1, len(models.floats))
                digests = models.digests()
                if mean:
                    mean.describe(about_mean(digests))
            if mean:  # it is whole, so that its digest is known
                shared = mean.digest
            for name, writer in writers.items():
                writer.describe(about_one(name, digests, shared))
        return losses


def quantize_mixture(opened: Checkpoint, quantization: Quantization, path: Path) -> Loss:
    """Writes a mixture again with what tasks add to the shared weights as codes, tensor by tensor, and fits to it what was
    computed from that.

    Raises:
        InputError: one of those has NaN or infinity.
    """
    mixture = mixture_of(opened)
    scheme = Scheme.of(quantization.bits, quantization.per, mixture.task_parts)
    whole = {name: each for name, each in opened.entries.items() if name not in scheme.shapes}
    layout = {name: (each.dtype, each.shape) for name, each in whole.items()} | scheme.layout()
    check_space({path: layout_size(layout)})

    def about(loss: Loss) -> dict[str, str]:
        return {**opened.metadata, KEY: scheme.to_json(), **loss.metadata()}

    def as_kept(name: str) -> Tensor:
        values = opened.read(name)
        return (
            _kept(quantize(values.float(), scheme.bits, scheme.per), values, scheme)
            if name in scheme.shapes
            else values
        )

    with SafetensorsWriter(path, layout, about(Loss())) as writer:
        loss = Loss()
        shared = [name for name, entry in mixture.shared.entries.items() if entry.is_float]
        refitted = mixture.method.refitted(shared, opened.read, as_kept)
        for name in opened.entries:
            interrupts.check()
            values = opened.read(name)
            if name not in scheme.shapes:
                writer.write(name, refitted.get(name, values))
                continue
            exact = values.float()
            expect_finite({name: exact}, path, "the file is damaged: merge again")
            loss += Loss.of(exact, _coded(writer, name, exact, scheme))
        writer.describe(about(loss))
    return loss


@dataclass(frozen=True)
class _Work:
    """What is done with one tensor of all models."""

    scheme: Scheme
    finer: Scheme
    dtype: str
    writers: Mapping[str, SafetensorsWriter]
    mean: SafetensorsWriter | None

    def on(self, _: int, group: Group) -> dict[str, Loss]:
        """Writes the group's task vectors, and gives what is lost of each.

        Raises:
            InputError: a difference is too large for float32 or for the dtype.
        """
        deltas, shared = group.deltas, None
        if self.mean and group.name in self.scheme.shapes:
            shared = _coded(self.mean, group.name, total(deltas).div_(group.tasks), self.finer)
        found: dict[str, Loss] = {}
        for (name, writer), delta in zip(self.writers.items(), deltas, strict=True):
            if group.name in self.scheme.shapes:
                rest = delta if shared is None else delta - shared
                kept = _coded(writer, group.name, rest, self.scheme)
                if shared is not None:
                    kept += shared
            else:
                kept = _cast(writer, group.name, delta, self.dtype)
            found[name] = loss = Loss.of(delta, kept)
            if not math.isfinite(loss.lost):
                raise InputError(
                    f"{name}: `{group.name}`: its differences are too large for what they are written as",
                    "its training diverged, or the file is damaged: leave the model out, or take an earlier checkpoint",
                )
        return found


def _cast(writer: SafetensorsWriter, name: str, delta: Tensor, dtype: str) -> Tensor:
    """Writes a tensor in its dtype, and gives it as it will be read."""
    import torch

    cast = delta.to(getattr(torch, dtype))
    writer.write(name, cast)
    return cast.float()


def _coded(writer: SafetensorsWriter, name: str, values: Tensor, scheme: Scheme) -> Tensor:
    """Writes a tensor as codes, and gives it as it will be read."""
    quantized = quantize(values, scheme.bits, scheme.per)
    for key, part in tensors_of(name, quantized).items():
        writer.write(key, part)
    return _kept(quantized, values, scheme)


def _kept(quantized: Quantized, values: Tensor, scheme: Scheme) -> Tensor:
    """The values as they will be read of their codes."""
    import torch

    kept = torch.empty(values.numel())
    steps = Steps.of(quantized.scale, quantized.zero, values.numel())
    dequantize(lambda first, last: quantized.codes[first:last], scheme.bits, kept, 0, steps)
    return kept.view(values.shape)
