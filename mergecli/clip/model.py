"""A whole CLIP in memory, and vision towers put into it and written out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergecli.clip.processor import expect_fit, read_processor
from mergecli.formats.convert import why_foreign
from mergecli.runtime.errors import InputError, listed
from mergecli.storage.atomic import expect_finite, whole_folder, write_text
from mergecli.storage.checkpoint import VISION, Checkpoint, open_checkpoint
from mergecli.storage.differences import Form, differences, leave_out_hint, other_architecture
from mergecli.storage.file_state import expect_unchanged
from mergecli.storage.metadata import model_folder_files
from mergecli.storage.safetensors_writer import save_tensors


@dataclass(frozen=True)
class Clip:
    """A CLIP in float32, never in training mode, with its tokenizer and its image processor (the one of PIL)."""

    path: Path
    model: Any
    """A `transformers.CLIPModel`; `set_tower` changes the weights of its `vision_model`."""
    tokenizer: Any
    processor: Any
    forms: Mapping[str, Form]
    """The tensors of a vision tower that fits, by full name: of the plain tower, whatever layers are installed now."""

    @property
    def tower(self) -> nn.Module:
        """The vision tower; the keys of its `state_dict` have no prefix."""
        return self.model.vision_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    def drop_text_tower(self) -> None:
        """Frees the text tower, which is as large as a vision tower, once the heads are made."""
        del self.model.text_model


def load_clip(path: Path) -> Clip:
    """The CLIP in a folder as `save_pretrained` writes it: weights, tokenizer and image processor.

    The image processor is always the one that works with PIL: torchvision's rounds differently, and results would depend
    on whether it is installed.

    Raises:
        InputError: a file is missing or damaged, the folder does not hold a whole CLIP, or its parts do not fit.
    """
    with open_checkpoint(path) as stored:
        if not path.is_dir() or not stored.is_whole_clip:
            raise InputError(
                f"{path}: is not a whole CLIP",
                (path.is_dir() and why_foreign(stored))
                or "a base is a folder with both towers and a tokenizer",
            )
    _expect(path, "config.json")
    _expect(path, "preprocessor_config.json", "processor_config.json")
    _expect(path, "tokenizer.json", "vocab.json")
    from transformers import CLIPModel, CLIPTokenizer

    factory: Any = CLIPModel

    with _quiet():
        try:
            model, info = factory.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            processor = read_processor(path)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{path}: cannot be loaded as a CLIP: {str(error).splitlines()[0]}") from error
    for file, state in zip(stored.files, stored.states, strict=True):
        expect_unchanged(file, state)
    wrong = [f"lacks tensor `{name}`" for name in sorted(_not_filled(model, path, info["missing_keys"]))]
    wrong += [f"`{name}` has another shape than its config says" for name, *_ in info["mismatched_keys"]]
    if wrong:
        raise InputError(f"{path}: the weights do not fit `config.json`:\n{listed(wrong)}")
    if len(tokenizer) < 10:
        raise InputError(f"{path}: its tokenizer knows only {len(tokenizer)} tokens", "fetch the base again")
    expect_fit(processor, path, model.config.vision_config)
    tower = model.vision_model.state_dict()
    forms = {VISION + name: Form(tuple(tensor.shape)) for name, tensor in tower.items()}
    return Clip(path, model.eval().requires_grad_(False), tokenizer, processor, forms)


def _not_filled(model: Any, path: Path, missing: Iterable[str]) -> list[str]:
    """Which tensors are still missing, once those are filled in that the file has under a wrapper's names."""
    names, state = list(missing), model.state_dict()
    if not names:
        return []
    with open_checkpoint(path) as stored, torch.no_grad():
        for name in names:
            if name in stored.entries and stored.entries[name].shape == state[name].shape:
                state[name].copy_(stored.read(name))
        return [
            name
            for name in names
            if name not in stored.entries or stored.entries[name].shape != state[name].shape
        ]


def check_tower(clip: Clip, checkpoint: Checkpoint) -> None:
    """Compares names and shapes of a checkpoint with the CLIP's vision tower; reads no weights.

    Raises:
        InputError: tensors are missing, extra or of another shape; all of them are listed.
    """
    want, have = clip.forms, checkpoint.vision().entries
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
    """Puts a checkpoint's weights into the CLIP's vision tower; a task vector is added to the base's own.

    Raises:
        InputError: the tensors do not fit; nothing was changed then.
    """
    check_tower(clip, checkpoint)
    stored = checkpoint.vision()
    with contextlib.ExitStack() as files:
        base = files.enter_context(open_checkpoint(clip.path)) if checkpoint.is_task_vector else None
        with torch.no_grad():
            for name, tensor in clip.tower.state_dict().items():
                value = stored.read(VISION + name).to(torch.float32)
                if base is not None:
                    value += base.read(VISION + name).to(torch.float32)
                tensor.copy_(value)


def features(clip: Clip, pixel_values: Tensor) -> Tensor:
    """(B, D) the tower's pooled output after the CLIP's visual projection; not normalized."""
    return clip.model.visual_projection(clip.tower(pixel_values=pixel_values).pooler_output)


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
    if not any((folder / name).is_file() for name in names):
        raise InputError(f"{folder}: has no `{names[0]}`", "fetch or copy the whole repository of the base")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keeps transformers from printing reports and drawing bars; what was set before comes back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
