"""The names of a CLIP's tensors in open_clip's and OpenAI's files, and those of Hugging Face for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.runtime.errors import InputError, listed, quoted
from mergecli.storage.checkpoint import PROJECTION, VISION, Checkpoint, TensorEntry, canonical_names
from mergecli.storage.checksums import ChunkHashes
from mergecli.storage.lazy_checkpoint import BlockReader, LazyCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

_TEXT = "text_model."
_MARKS = ("class_embedding", "conv1.weight", "ln_pre.weight")
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True)
class Origin:
    """The tensor of the old file that one of ours is, or is a part of."""

    name: str
    third: int | None = None
    """Which third of its rows, where query, key and value (0, 1, 2) stand in one tensor."""
    transposed: bool = False
    scalar: bool = False
    """Whether it has no dimension with us, and may have one of size 1 there."""

    def taken_from(self, tensor: Tensor) -> Tensor:
        """(...) ours: a view of the old tensor."""
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        if self.scalar:
            return tensor.view(())
        return tensor.t() if self.transposed else tensor

    def shape_of(self, shape: Shape) -> Shape:
        """The shape of ours, where the old tensor has this one."""
        if self.third is not None:
            return (shape[0] // 3, *shape[1:])
        if self.scalar:
            return ()
        return shape[::-1] if self.transposed else shape

    def problem(self, shape: Shape) -> str:
        """Why a tensor of this shape cannot become ours; empty if it can."""
        if self.third is not None and (not shape or not shape[0] or shape[0] % 3):
            return f"`{self.name}` has shape {shape}, which does not split into query, key and value"
        if self.scalar and shape not in ((), (1,)):
            return f"`{self.name}` has shape {shape}, one entry was expected"
        if self.transposed and len(shape) != 2:
            return f"`{self.name}` has shape {shape}, two dimensions were expected"
        return ""


@dataclass(frozen=True)
class Renaming:
    """Our name -> where it comes from, and the names of the tensors that have no place with us."""

    origins: Mapping[str, Origin]
    left_out: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether any tensor gets another name or is left out."""
        return bool(self.left_out) or any(name != origin.name for name, origin in self.origins.items())


def renaming(path: Path, shapes: Mapping[str, Shape], *, opened: bool) -> Renaming:
    """Our names for the tensors of a file.

    Names of an open_clip vision transformer, under whatever prefix, become those of Hugging Face's CLIPModel if the
    text tower is there too, else those of its CLIPVisionModelWithProjection: what is left of a text tower, which the
    fine-tuned encoders of task arithmetic carry along, then has no place. Other names are read as in any file.

    Args:
        opened: whether the names are those of an open checkpoint, which are without wrappers already.

    Raises:
        InputError: there are two towers, or a tower lacks tensors or has more or others than a CLIP's.
    """
    theirs = {ours: name for name, ours in canonical_names(shapes, ours=opened).items()}
    known = {ours: shapes[name] for ours, name in theirs.items()}
    roots = [
        name.removesuffix(_MARKS[0])
        for name in known
        if name.endswith(_MARKS[0]) and all(name.removesuffix(_MARKS[0]) + mark in known for mark in _MARKS)
    ]
    if len(roots) > 1:
        raise InputError(
            f"{path}: holds {len(roots)} vision towers: {quoted(roots)}", "save the one that is meant alone"
        )
    found = _clip(path, roots[0], known) if roots else Renaming({ours: Origin(ours) for ours in known})
    origins = {ours: replace(origin, name=theirs[origin.name]) for ours, origin in found.origins.items()}
    used = {origin.name for origin in origins.values()}
    return Renaming(origins, tuple(name for name in shapes if name not in used))


@dataclass(frozen=True)
class Part:
    """One of our tensors in a tensor of open_clip."""

    name: str
    origin: Origin
    """Where it lies there."""


def open_clip_parts(path: Path, names: Iterable[str]) -> dict[str, list[Part]]:
    """Tensor of open_clip's CLIP -> ours that it is made of: one, or queries, keys and values in order.

    Args:
        names: ours, of a whole CLIP.

    Raises:
        InputError: a tensor of a CLIP is not among them, or there are others.
    """
    known = set(names)
    layers = {tower: _layers(tower, known) for tower in (VISION, _TEXT)}
    origins = _whole("", "", "visual.", layers[VISION], layers[_TEXT])
    problems = [f"lacks tensor `{name}`" for name in sorted(origins.keys() - known)]
    problems += [f"has an extra tensor `{name}`" for name in sorted(known - origins.keys())]
    if problems:
        raise InputError(
            f"{path}: has not the tensors of a CLIP:\n{listed(problems, 10)}",
            "only OpenAI's architecture, such as ViT-B-32, has a place in open_clip's `CLIP`",
        )
    found: dict[str, list[Part]] = {}
    for name, origin in origins.items():
        found.setdefault(origin.name, []).append(Part(name, origin))
    return found


def _layers(tower: str, names: Iterable[str]) -> int:
    start = f"{tower}encoder.layers."
    return len({name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)})


def _whole(whole: str, text: str, visual: str, layers: int, text_layers: int) -> dict[str, Origin]:
    """The origins of a whole CLIP: `whole` is what the names of all begin with, `text` and `visual` those of its towers."""
    return {
        **_tower(visual, layers),
        **_text_tower(text, text_layers),
        PROJECTION: _projection(visual),
        "text_projection.weight": Origin(text + "text_projection", transposed=True),
        "logit_scale": Origin(whole + "logit_scale", scalar=True),
    }


def _clip(path: Path, root: str, shapes: Mapping[str, Shape]) -> Renaming:
    """The renaming of a CLIP whose vision tower's names begin with `root`."""
    layers = _blocks_of(root, shapes)
    origins = _tower(root, layers)
    if root + "proj" in shapes:
        origins[PROJECTION] = _projection(root)
    inside = [root]
    whole = root.removesuffix("visual.")
    text = whole + "text." if any(name.startswith(whole + "text.transformer.") for name in shapes) else whole
    if root.endswith("visual.") and any(name.startswith(text + "transformer.resblocks.") for name in shapes):
        inside.append(text + "transformer.")
        origins = _whole(whole, text, root, layers, _blocks_of(text, shapes))
    used = {origin.name for origin in origins.values()}
    left_out = [name for name in shapes if name not in used]
    problems = [f"lacks tensor `{name}`" for name in sorted(used - shapes.keys())]
    problems += [f"has an extra tensor `{name}`" for name in left_out if name.startswith(tuple(inside))]
    shaped = [origin.problem(shapes[origin.name]) for origin in origins.values() if origin.name in shapes]
    problems += [problem for problem in dict.fromkeys(shaped) if problem]
    if problems:
        raise InputError(
            f"{path}: has the names of an open_clip vision transformer, but not the tensors of a CLIP:\n"
            f"{listed(problems, 40)}",
            "only OpenAI's architecture, such as ViT-B-32, can be converted",
        )
    return Renaming(origins)


def _blocks_of(root: str, names: Iterable[str]) -> int:
    """How many transformer blocks there are in the file."""
    start = f"{root}transformer.resblocks."
    return len({name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)})


def _tower(root: str, layers: int) -> dict[str, Origin]:
    return {
        VISION + "embeddings.class_embedding": Origin(root + "class_embedding"),
        VISION + "embeddings.patch_embedding.weight": Origin(root + "conv1.weight"),
        VISION + "embeddings.position_embedding.weight": Origin(root + "positional_embedding"),
        **_pair(VISION + "pre_layrnorm", root + "ln_pre"),
        **_pair(VISION + "post_layernorm", root + "ln_post"),
        **_blocks(VISION, root, layers),
    }


def _projection(root: str) -> Origin:
    return Origin(root + "proj", transposed=True)


def _text_tower(root: str, layers: int) -> dict[str, Origin]:
    return {
        _TEXT + "embeddings.token_embedding.weight": Origin(root + "token_embedding.weight"),
        _TEXT + "embeddings.position_embedding.weight": Origin(root + "positional_embedding"),
        **_pair(_TEXT + "final_layer_norm", root + "ln_final"),
        **_blocks(_TEXT, root, layers),
    }


def _blocks(ours: str, root: str, layers: int) -> dict[str, Origin]:
    """Of so many transformer blocks."""
    origins: dict[str, Origin] = {}
    for number in range(layers):
        new, old = f"{ours}encoder.layers.{number}.", f"{root}transformer.resblocks.{number}."
        for theirs, name in _BLOCK.items():
            origins |= _pair(new + name, old + theirs)
        for third, letter in enumerate("qkv"):
            for kind in ("weight", "bias"):
                origins[f"{new}self_attn.{letter}_proj.{kind}"] = Origin(f"{old}attn.in_proj_{kind}", third)
    return origins


def _pair(ours: str, theirs: str) -> dict[str, Origin]:
    return {f"{ours}.{kind}": Origin(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def read_through(stored: Checkpoint) -> Checkpoint:
    """The checkpoint under our names, whose tensors are read where they lie in the file; itself if they are ours already,
    or are not those of one CLIP."""
    try:
        plan = renaming(
            stored.path, {name: entry.shape for name, entry in stored.entries.items()}, opened=True
        )
    except InputError:
        return stored  # whoever compares it with others says what is wrong
    if not plan.changes:
        return stored
    entries: dict[str, TensorEntry] = {}
    readers: list[BlockReader] = []
    for number, (name, origin) in enumerate(sorted(plan.origins.items())):
        old = stored.entries[origin.name]
        entries[name] = TensorEntry(old.dtype, origin.shape_of(old.shape), number, 0)
        first = (origin.third or 0) * entries[name].size
        readers.append(partial(_transposed if origin.transposed else _part, stored, origin.name, first))
    return LazyCheckpoint(
        path=stored.path,
        entries=entries,
        metadata=stored.metadata,
        files=stored.files,
        descriptors=(),
        hashes=ChunkHashes(),
        states=(),
        readers=tuple(readers),
        sources=(stored,),
    )


def _part(stored: Checkpoint, name: str, first: int, start: int, stop: int, into: Tensor) -> None:
    stored.read_entries(name, first + start, first + stop, into=into)


def _transposed(stored: Checkpoint, name: str, _: int, start: int, stop: int, into: Tensor) -> None:
    into.copy_(stored.read(name).t().flatten()[start:stop])
