"""A whole CLIP in memory, and vision towers put into it and written out of it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mergecli.clip.config import expect_weights, read_config
from mergecli.clip.dual_encoder import (
    LibraryTokenizer,
    is_dual_encoder,
    library_version,
    read_image_half,
    read_text_half,
)
from mergecli.clip.network import Attention, TextModel, VisionModel, VisionTower
from mergecli.clip.processor import ImageProcessor, expect_fit, read_processor
from mergecli.clip.tokenizer import OWN, Tokenizer
from mergecli.formats.convert import why_foreign
from mergecli.formats.open_clip_config import lacks_config
from mergecli.runtime.errors import InputError, listed
from mergecli.storage.atomic import expect_finite, whole_folder, write_text
from mergecli.storage.checkpoint import PROJECTION, VISION, Checkpoint, open_checkpoint
from mergecli.storage.differences import Form, differences, leave_out_hint, other_architecture
from mergecli.storage.file_state import expect_unchanged
from mergecli.storage.metadata import model_folder_files, other_kind
from mergecli.storage.safetensors_writer import save_tensors

Made = TypeVar("Made", bound=nn.Module)


@dataclass(frozen=True)
class Clip:
    """A CLIP in float32, never in training mode. Its text tower and its tokenizer are read when they are first used: where
    heads are kept, never.

    Or another dual encoder: then the model, the text tower and the tokenizer are those of transformers.
    """

    path: Path
    model: VisionModel
    """`set_tower` changes the weights of its `vision_model` and of its `visual_projection`. Of another dual encoder it is
    transformers' model without the text tower, whose parts and sizes have the same names; it may have no
    `visual_projection`."""
    processor: ImageProcessor
    forms: Mapping[str, Form]
    """The tensors of a vision tower that fits, by full name: of the plain tower, whatever layers are installed now."""
    states: Mapping[Path, int]
    """Of the files of weights when they were read."""
    kind: str = "clip"
    """The `model_type` of `config.json`."""
    projection: Tensor | None = None
    """(D, W) its own visual projection, for towers that have none; None where it has none either."""

    @property
    def tower(self) -> VisionTower:
        """The vision tower; the keys of its `state_dict` have no prefix."""
        return self.model.vision_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    @property
    def is_clip(self) -> bool:
        """Whether it is a CLIP, whose layers are our own."""
        return self.kind == "clip"

    @property
    def computed_by(self) -> str:
        """Whose forward pass it is: others round differently."""
        return "own layers" if self.is_clip else library_version()

    @cached_property
    def tokenizer(self) -> Tokenizer | LibraryTokenizer:
        """Prompts to tokens. Raises InputError if a file is damaged."""
        return Tokenizer(self.path) if self.is_clip else LibraryTokenizer(self.path, self.model.config)

    @cached_property
    def text(self) -> TextModel:
        """The text tower with its projection, where the CLIP is."""
        with open_checkpoint(self.path) as stored:
            self._expect_unchanged()
            if self.is_clip:
                model = _read(lambda: TextModel(self.model.config), stored)
            else:
                model = read_text_half(self.path, stored)
        return model.to(self.device)

    def expect_clip(self, what: str) -> None:
        """Raises InputError if it is another dual encoder than a CLIP, with which something cannot be done."""
        if not self.is_clip:
            raise InputError(f"{self.path}: is a model of the kind `{self.kind}`, not a CLIP: {what}")

    def _expect_unchanged(self) -> None:
        for file, state in self.states.items():
            expect_unchanged(file, state)

    def drop_text_tower(self) -> None:
        """Frees the text tower, which is as large as a vision tower, once the heads are made."""
        vars(self).pop("text", None)


def load_clip(path: Path) -> Clip:
    """The CLIP, or other dual encoder, in a folder as `save_pretrained` writes it: weights, tokenizer and image processor.

    Raises:
        InputError: a file is missing or damaged, the folder does not hold a whole CLIP, or its parts do not fit.
    """
    with open_checkpoint(path) as stored:
        kind = other_kind(path / "config.json") if path.is_dir() else ""
        if kind and not is_dual_encoder(kind):
            raise InputError(
                f"{path}: is a model of the kind `{kind}`, not a CLIP or another dual encoder",
                "`merge`, `taskvector` and `cos-sim` take any weights; images are classified by dual encoders only",
            )
        if not path.is_dir() or not stored.is_whole_clip:
            raise InputError(
                f"{path}: is not a whole CLIP",
                (path.is_dir() and why_foreign(stored))
                or "a base is a folder with both towers and a tokenizer",
            )
        _expect(path, "config.json")
        _expect(path, "preprocessor_config.json", "processor_config.json")
        states = dict(zip(stored.files, stored.states, strict=True))
        if kind:
            found = read_image_half(path, stored, kind)
            forms = {name: _form(shape) for name, shape in found.shapes.items() if name.startswith(VISION)}
            return Clip(path, found.model, found.processor, forms, states, kind, _projection(found.model))
        _expect(path, "tokenizer.json", "vocab.json")
        config = read_config(path / "config.json")
        processor = read_processor(path)
        with torch.device("meta"):
            parts = (VisionModel(config), TextModel(config))
        want = {name: tuple(each.shape) for part in parts for name, each in part.state_dict().items()}
        expect_weights(path, want, stored)
        expect_fit(processor, path, config.vision_config)
        model = _read(lambda: VisionModel(config), stored)
        forms = {name: _form(shape) for name, shape in want.items() if name.startswith(VISION)}
        return Clip(path, model, processor, forms, states, projection=_projection(model))


def _form(shape: tuple[int, ...]) -> Form:
    return Form(shape, "floating point", any_float=True)


def _projection(model: VisionModel) -> Tensor | None:
    """A copy of the visual projection; None where a dual encoder has none."""
    layer = getattr(model, "visual_projection", None)
    return layer.weight.detach().clone() if isinstance(layer, nn.Linear) else None


def _read(make: Callable[[], Made], stored: Checkpoint) -> Made:
    """A module with the weights of a file in float32, that needs no gradients.

    Not by `to_empty`: of a module on the device `meta` it imports sympy, which takes as long as all of torch.
    """
    with torch.device("meta"):
        model = make()
    weights = {name: stored.read(name).to(torch.float32) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    for each in model.modules():
        if isinstance(each, Attention):
            each.join()
    return model.requires_grad_(False).eval()


def read_into(tensor: Tensor, stored: Checkpoint, name: str) -> None:
    """Replaces a float32 tensor by one of a file, whatever its dtype there."""
    if stored.entries[name].dtype == "F32" and tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        stored.read_entries(name, 0, tensor.numel(), tensor.view(-1))
    else:
        tensor.copy_(stored.read(name).to(torch.float32))


def check_tower(clip: Clip, checkpoint: Checkpoint) -> None:
    """Compares names, shapes and kinds of dtype of a checkpoint with the CLIP's vision tower, and with its visual projection if the
    checkpoint has one; reads no weights.

    Raises:
        InputError: tensors are missing, extra, of another shape or no floating point numbers; all of them are listed.
    """
    want, have = clip.forms, checkpoint.encoder().entries
    if clip.projection is not None and PROJECTION in have:
        want = {**want, PROJECTION: _form(tuple(clip.projection.shape))}
    if lines := differences(have, want, "the base has"):
        cure = "name the base that it was fine-tuned from"
        if (extra := have.keys() - want.keys()) and len(extra) == len(lines):
            cure = leave_out_hint(extra)
        other = other_architecture(have, want, "the base has")
        raise InputError(
            f"{checkpoint.path}: does not fit the vision tower of {clip.path}:\n{listed([other] if other else lines)}",
            why_foreign(checkpoint) or cure,
            listed(lines, len(lines)) if other else "",
        )


def set_tower(clip: Clip, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's weights into the CLIP's vision tower; a task vector is added to the base's own. The visual
    projection becomes the checkpoint's, or the CLIP's own again if that has none.

    Raises:
        InputError: the tensors do not fit; nothing was changed then.
    """
    check_tower(clip, checkpoint)
    stored = checkpoint.encoder()
    tensors = {VISION + name: tensor for name, tensor in clip.tower.state_dict().items()}
    with contextlib.ExitStack() as files, torch.no_grad():
        if clip.projection is not None:
            weight = clip.model.visual_projection.weight.data
            if PROJECTION in stored.entries:
                tensors[PROJECTION] = weight
            else:
                weight.copy_(clip.projection)
        base = files.enter_context(open_checkpoint(clip.path)) if checkpoint.is_task_vector else None
        for name, tensor in tensors.items():
            if base is None:
                read_into(tensor, stored, name)
            else:
                value = stored.read(name).to(torch.float32)
                tensor.copy_(value.add_(base.read(name).to(torch.float32)))
    stored.expect_unchanged()


def features(clip: Clip, pixel_values: Tensor) -> Tensor:
    """(B, D) the tower's pooled output after the CLIP's visual projection; not normalized."""
    return clip.model(pixel_values)


def save_tower(clip: Clip, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None = None) -> None:
    """Writes the CLIP's vision tower as it is now, with keys that begin with `vision_model.`.

    One file where `path` ends in `.safetensors`; else a folder that `CLIPVisionModel.from_pretrained` loads.
    """
    state = {
        VISION + name: tensor.detach().cpu().to(dtype or tensor.dtype)
        for name, tensor in clip.tower.state_dict().items()
    }
    expect_finite(state, path, "train with a lower learning rate")
    if path.suffix == ".safetensors":
        save_tensors(state, path, metadata)
        return
    with whole_folder(path) as folder:
        save_tensors(state, folder / "model.safetensors", metadata)
        for name, text in model_folder_files(clip.path).items():
            write_text(folder / name, text)


def _expect(folder: Path, *names: str) -> None:
    """Raises InputError unless one of the files is there."""
    if any((folder / name).is_file() for name in names):
        return
    instead, hint = "", "fetch or copy the whole repository of the base"
    if names[0].startswith("tokenizer") and (other := sorted(each.name for each in folder.glob("*.model"))):
        instead, hint = f", but `{other[0]}`: a tokenizer of SentencePiece, as no CLIP has", OWN
    elif lacks_config(folder):
        hint = f"`mergecli fetch {shlex.quote(str(folder))}` makes it of its `open_clip_config.json`"
    raise InputError(f"{folder}: has no `{names[0]}`{instead}", hint)
