"""What Python gets: vision towers and whole CLIPs as modules of transformers, and modules saved as checkpoints."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.clip.dual_encoder import read_whole, vision_class
from mergecli.runtime.errors import InputError, listed
from mergecli.storage.atomic import check_target, write_text
from mergecli.storage.checkpoint import VISION, Checkpoint, open_checkpoint
from mergecli.storage.differences import Form, differences, other_architecture
from mergecli.storage.metadata import about, other_kind

if TYPE_CHECKING:
    from mergecli.clip.model import Clip


def load_tower(folder: Path, checkpoint: Checkpoint, base: Checkpoint | None = None) -> Any:
    """The checkpoint's vision tower in float32, in evaluation mode, with the configuration in `folder`; a task vector
    is added to the `base`.

    Raises:
        InputError: the tensors are not those that the configuration asks for.
    """
    import torch

    try:
        config, kind = _tower_class(folder)
        with torch.device("meta"):
            kind(config)
    except Exception as error:
        raise InputError(
            f"{folder / 'config.json'}: is not a vision tower's configuration: {str(error).splitlines()[0]}"
        ) from error
    with torch.device("meta"):
        want = {VISION + key: Form(tuple(each.shape)) for key, each in kind(config).state_dict().items()}
    if wrong := differences(checkpoint.entries, want, "the configuration asks for"):
        other = other_architecture(checkpoint.entries, want, "the configuration asks for")
        raise InputError(
            f"{checkpoint.path}: does not fit {folder / 'config.json'}:\n{listed([other] if other else wrong)}",
            "load it with the configuration that it was made with",
            listed(wrong, len(wrong)) if other else "",
        )
    model: Any = kind(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(checkpoint.read(VISION + key))
            if base is not None:
                tensor.add_(base.read(VISION + key).float())
    return model.eval()


def _tower_class(folder: Path) -> tuple[Any, Any]:
    """The configuration of the vision tower in a folder, and the class that transformers has for it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if other_kind(folder / "config.json"):
        return vision_class(folder)
    return CLIPVisionConfig.from_pretrained(folder, local_files_only=True), CLIPVisionModel


def load_processor(folder: Path) -> Any:
    """The `transformers.CLIPProcessor` of a model's folder; its image processor is the one of PIL. Of another dual encoder
    it is the processor that transformers has for it."""
    from transformers import AutoProcessor, CLIPProcessor, CLIPTokenizer

    from mergecli.clip.processor import read_processor

    try:
        if other_kind(folder / "config.json"):
            return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        read_processor(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        images = _pil_processor().from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: has no processor: {str(error).splitlines()[0]}") from error
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def _pil_processor() -> Any:
    """The image processor class that works with PIL, under whichever name this transformers has it: that of torchvision
    rounds differently, and results would depend on whether it is installed."""
    import transformers

    for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"):
        with contextlib.suppress(AttributeError, ImportError):
            found = getattr(transformers, name)
            if not getattr(found, "is_fast", False):
                return found
    from transformers.models.clip import image_processing_clip

    return image_processing_clip.CLIPImageProcessor


def load_whole(clip: Clip) -> Any:
    """A `transformers.CLIPModel` with the weights of a CLIP; of another dual encoder the model that transformers has for it."""
    if not clip.is_clip:
        with open_checkpoint(clip.path) as stored:
            whole = read_whole(clip.path, stored)
        whole.load_state_dict(clip.model.state_dict(), strict=False)
        return whole
    from transformers import CLIPConfig, CLIPModel

    model: Any = CLIPModel(CLIPConfig.from_pretrained(clip.path, local_files_only=True))
    model.load_state_dict({**clip.model.state_dict(), **clip.text.state_dict()})
    return model.requires_grad_(False).eval()


def save_module(model: Any, path: Path) -> Path:
    """Writes a module's weights as a checkpoint: a `.safetensors` file, or a folder with the module's configuration.

    A vision tower's keys begin with `vision_model.`; other modules' stay as they are.
    """
    from mergecli.storage.checkpoint import canonical_names
    from mergecli.storage.safetensors_writer import save_tensors

    check_target(path, folder=not path.suffix)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise InputError(f"{path.name}: the module is on the meta device and has no weights", "load it first")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    named = {ours: state[theirs].clone() for theirs, ours in canonical_names(state).items()}
    if path.suffix:
        save_tensors(named, path, about("checkpoint"))
        return path
    save_tensors(named, path / "model.safetensors", about("checkpoint"))
    config = getattr(model, "config", None)
    if config is not None:
        write_text(path / "config.json", json.dumps(config.to_diff_dict(), indent=2, sort_keys=True) + "\n")
    return path
