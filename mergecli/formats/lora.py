"""A low-rank adapter as a checkpoint: base + s B A, and its closed form where it was linearized, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergecli.formats.lora_files import Adapter
from mergecli.runtime.errors import InputError, listed, quoted
from mergecli.storage.checkpoint import VISION, Checkpoint
from mergecli.storage.lazy_checkpoint import BlockReader, LazyCheckpoint, lazy_checkpoint
from mergecli.storage.safetensors_format import entry_count

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 8
"""Rows of a weight that are multiplied together: always the same ones, so that no entry depends on how the weight is
cut into blocks. Products of other shapes round otherwise."""

Kind = Literal["linear", "convolution", "embedding"]
"""Of a module; peft has names and shapes of its own for the factors of each."""

KEPT = 4
"""Weights whose factors are kept in memory: those that several threads read at one time."""


@dataclass(frozen=True)
class LowRank:
    """The change s B A of one weight."""

    module: str
    """As the adapter calls it."""
    kind: Kind
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of B and A as matrices: (O, k) and (k, I)."""
    load: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
    scaling: float

    @property
    def rank(self) -> int:
        """k, which of a linearized adapter is twice its own."""
        return self.shapes[1][0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(O, k) s B and (k, I) A in float64."""
        left, right, _ = self.load()
        return left.double() * self.scaling, right.double()


@dataclass(frozen=True, kw_only=True)
class AdaptedCheckpoint(LazyCheckpoint):
    """A base with an adapter added."""

    base: Checkpoint
    adapter: Adapter
    changes: Mapping[str, LowRank]
    """Weight -> its change, which of DoRA is only a part of it."""
    others: tuple[str, ...]
    """Names of the tensors that it changes besides, such as biases."""
    prefix: str
    """What names have here before the adapter's own."""
    dtype: str | None
    """What base and change are rounded to together."""

    @property
    def biases(self) -> dict[str, str]:
        """Bias that it changes -> as the adapter calls it."""
        return {name: name.removeprefix(self.prefix) for name in self.others if name.endswith(".bias")}

    @property
    def more_than_low_rank(self) -> str:
        """What it changes that neither products of factors of low rank do nor biases; empty if there is nothing."""
        if self.adapter.config.use_dora:
            return "is a DoRA, whose change is not of low rank"
        if self.dtype is not None:
            return f"is rounded to {self.dtype} together with its base"
        if whole := [name for name in self.others if not name.endswith(".bias")]:
            return f"has whole tensors: {quoted(whole)}"
        return ""


def adapted(
    base: Checkpoint, adapter: Adapter, *, path: Path | None = None, dtype: str | None = None
) -> AdaptedCheckpoint:
    """The base with the adapter added, as a checkpoint; nothing is computed before it is read.

    LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A. Linearized at (A0, B0) (Tang et al. 2024, arXiv 2310.04742):
    W + s (B A0 + B0 A - B0 A0). DoRA (Liu et al. 2024, arXiv 2402.09353): m (W + s B A) / |W + s B A|, the norm of each
    row. All in float32, rounded once, to `dtype` (a torch name) or else to the base's own. Weights that the adapter
    holds whole replace the base's. Base and adapter are closed with it.

    Raises:
        InputError: the adapter was made for another base; everything that does not fit is listed.
    """
    if base.is_task_vector:
        raise InputError(f"{base.path}: is a task vector; an adapter is added to weights")
    prefix = _prefix(base, adapter)
    problems = list(_misfits(base, adapter, prefix))
    if problems:
        made_on = f"; it says `{adapter.config.base}`" if adapter.config.base else ""
        raise InputError(
            f"{adapter.stored.path}: does not fit {base.path}:\n{listed(problems, 10)}",
            f"name the base that the adapter was trained on{made_on}",
        )
    load = lru_cache(KEPT)(partial(_load, adapter))
    readers: dict[str, BlockReader] = {}
    changes: dict[str, LowRank] = {}
    for module, parts in adapter.modules.items():
        name = f"{prefix}{module}.weight"
        changes[name] = _low_rank(adapter, module, partial(load, module))
        readers[name] = _Weight(base, name, changes[name].load, changes[name].scaling).read_block
        if "B.bias" in parts:
            name = f"{prefix}{module}.bias"
            scaling = adapter.config.scaling(module)
            readers[name] = partial(_add, base, name, adapter.stored, parts["B.bias"], scaling)
    for name, key in adapter.whole.items():
        readers[prefix + name] = partial(_replace, adapter.stored, key)
    metadata = {key: text for key, text in adapter.stored.metadata.items() if key in ("method", "inputs")}
    lazy = lazy_checkpoint(base, readers, dtype=dtype, path=path, metadata=metadata, others=(adapter.stored,))
    known: dict[str, Any] = {**vars(lazy), "files": (*lazy.files, adapter.config.path)}
    others = tuple(name for name in readers if name not in changes)
    return AdaptedCheckpoint(
        **known, base=base, adapter=adapter, changes=changes, others=others, prefix=prefix, dtype=dtype
    )


def _low_rank(
    adapter: Adapter, module: str, load: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
) -> LowRank:
    entries = {part: adapter.stored.entries[key].shape for part, key in adapter.modules[module].items()}
    if "embedding_A" in entries:
        (rank, rows), (width, _) = entries["embedding_A"], entries["embedding_B"]
        kind: Kind = "embedding"
    else:
        (rows, rank, *_), (_, *inner) = entries["B"], entries["A"]
        width, kind = entry_count(tuple(inner)), "linear" if len(inner) == 1 else "convolution"
    rank *= 2 if adapter.is_linearized else 1
    return LowRank(module, kind, ((rows, rank), (rank, width)), load, adapter.config.scaling(module))


def _prefix(base: Checkpoint, adapter: Adapter) -> str:
    """What our names have before the adapter's, which may be those of the tower inside of a model."""
    names = [*(f"{module}.weight" for module in adapter.modules), *adapter.whole]
    inner, outer = (sum(prefix + name in base.entries for name in names) for prefix in (VISION, ""))
    return VISION if inner > outer else ""


def _misfits(base: Checkpoint, adapter: Adapter, prefix: str) -> Iterator[str]:
    """What of the adapter does not fit the base, and what it lacks by its own configuration."""
    config = adapter.config
    if config.fan_in_fan_out and not any(name.startswith(VISION) for name in base.entries):
        yield "`fan_in_fan_out`: the base is not a CLIP, and may store its weights either way"
    for module in adapter.modules:
        weight = base.entries.get(f"{prefix}{module}.weight")
        if weight is None:
            yield f"the base has no module `{module}`"
            continue
        if config.targets(module, is_linear=len(weight.shape) == 2) is False:
            yield f"has factors for `{module}`, which its `target_modules` do not name"
        yield from _other_shapes(base, adapter, prefix, module)
    for name, key in adapter.whole.items():
        entry = base.entries.get(prefix + name)
        is_bias = name.endswith(".bias") and config.bias != "none"
        if entry is None or not (is_bias or config.saves(name)):
            yield f"has an extra tensor `{key}`"
        elif entry.shape != adapter.stored.entries[key].shape:
            yield f"`{name}` has shape {adapter.stored.entries[key].shape}, the base has {entry.shape}"
    scope = VISION if prefix or all(each.startswith(VISION) for each in adapter.modules) else ""
    for name, entry in base.entries.items():
        own = name.removeprefix(prefix)
        module, _, last = own.rpartition(".")
        if not name.startswith(scope) or module in adapter.modules:
            continue
        is_linear = len(entry.shape) == 2 and not module.endswith("embedding")
        if last == "weight" and len(entry.shape) > 1 and config.targets(module, is_linear=is_linear):
            yield f"lacks factors for `{module}`, which its `target_modules` name"
        if config.saves(own) and own not in adapter.whole:
            yield f"lacks `{own}`, which its `modules_to_save` name"


def _other_shapes(base: Checkpoint, adapter: Adapter, prefix: str, module: str) -> Iterator[str]:
    shapes = {part: adapter.stored.entries[key].shape for part, key in adapter.modules[module].items()}
    weight, bias = (base.entries.get(f"{prefix}{module}.{name}") for name in ("weight", "bias"))
    if "embedding_A" in shapes:
        shape = (shapes["embedding_A"][1], shapes["embedding_B"][0])
    else:
        shape = (shapes["B"][0], *shapes["A"][1:])
    if weight and shape != weight.shape:
        yield f"`{module}`: is for a weight of shape {shape}, the base has {weight.shape}"
    if adapter.is_linearized and (shapes["A0"], shapes["B0"]) != (shapes["A"], shapes["B"]):
        yield f"`{module}`: was linearized at factors of other shapes than it has"
    if "B.bias" in shapes and (bias is None or bias.shape != shapes["B.bias"]):
        yield f"`{module}`: has a bias of shape {shapes['B.bias']}, the base has {bias.shape if bias else 'none'}"
    if (magnitudes := entry_count(shapes.get("magnitude_vector", shape[:1]))) != shape[0]:
        yield f"`{module}`: has {magnitudes} magnitudes for {shape[0]} rows"


def _load(adapter: Adapter, module: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(O, k) and (k, I) float32 factors of the change of a weight, whose filters are rows, and (O,) magnitudes."""
    import torch

    part = {name: adapter.stored.read(key).float() for name, key in adapter.modules[module].items()}
    if "embedding_A" in part:
        return part["embedding_A"].T.contiguous(), part["embedding_B"].T.contiguous(), None
    left, right = part["B"].flatten(1), part["A"].flatten(1)
    if adapter.is_linearized:  # B A0 + B0 A - B0 A0 as one product: [B B0] times A0 above A - A0
        left = torch.cat([left, part["B0"].flatten(1)], dim=1)
        right = torch.cat([part["A0"].flatten(1), right - part["A0"].flatten(1)])
    magnitudes = part.get("magnitude_vector")
    return left, right, None if magnitudes is None else magnitudes.flatten()


@dataclass(frozen=True)
class _Weight:
    """One weight of the base, with a change of low rank."""

    base: Checkpoint
    name: str
    load: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
    scaling: float

    def read_block(self, start: int, stop: int, into: Tensor) -> None:
        left, right, magnitudes = self.load()
        width = right.shape[1]
        # whole groups of ROWS rows, though the block may begin and end within one: see ROWS
        first = start // width // ROWS * ROWS
        for row in range(first, -(-stop // width), ROWS):
            rows = slice(row, min(row + ROWS, len(left)))
            begin, end = rows.start * width, rows.stop * width
            weight = self.base.read_entries(self.name, begin, end).float().view(-1, width)
            weight += (left[rows] @ right).mul_(self.scaling)
            if magnitudes is not None:
                weight *= (magnitudes[rows] / weight.norm(dim=1)).unsqueeze(1)
            low, high = max(begin, start), min(end, stop)
            into[low - start : high - start] = weight.view(-1)[low - begin : high - begin]


def _add(
    base: Checkpoint,
    name: str,
    stored: Checkpoint,
    key: str,
    scaling: float,
    start: int,
    stop: int,
    into: Tensor,
) -> None:
    change = stored.read_entries(key, start, stop).float().mul_(scaling)
    into.copy_(base.read_entries(name, start, stop).float().add_(change))


def _replace(stored: Checkpoint, key: str, start: int, stop: int, into: Tensor) -> None:
    into.copy_(stored.read_entries(key, start, stop))
