"""The sizes of a CLIP's towers, as `config.json` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from mergecli.runtime.errors import InputError, did_you_mean, listed, quoted, toml_text

if TYPE_CHECKING:
    from mergecli.storage.checkpoint import Checkpoint

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
"""Names of `hidden_act`."""


@dataclass(frozen=True)
class TransformerConfig:
    """What both towers have; defaults are those of transformers, for what a file does not say."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class VisionConfig(TransformerConfig):
    """Of the vision tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """Of the text tower."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    """The token whose feature is the prompt's; 2, as old files have it, stands for the largest token of a prompt."""


@dataclass(frozen=True)
class ClipConfig:
    """Of a whole CLIP."""

    vision_config: VisionConfig
    text_config: TextConfig
    projection_dim: int = 512


def read_config(file: Path) -> ClipConfig:
    """The configuration of a whole CLIP.

    Raises:
        InputError: it is none, or values cannot be used; all of them are listed.
    """
    problem = f"{file.parent}: cannot be loaded as a CLIP: `{file.name}`"
    try:
        known: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{problem} is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(known, dict):
        raise InputError(f"{problem} holds no table")
    table = cast("dict[str, Any]", known)
    if (kind := table.get("model_type", "clip")) != "clip":
        raise InputError(f"{problem} is of another kind of model, {toml_text(kind)}")
    wrong: list[str] = []
    vision = _read(VisionConfig, _part(table, "vision_config"), "vision_config.", wrong)
    text = _read(TextConfig, _part(table, "text_config"), "text_config.", wrong)
    dim = table.get("projection_dim")
    if dim is not None and not _is_size(dim):
        wrong.append(f"`projection_dim`: expected a whole number above 0, got {toml_text(dim)}")
    if wrong:
        raise InputError(f"{problem} has values that cannot be used:\n{listed(wrong)}")
    return ClipConfig(VisionConfig(**vision), TextConfig(**text), 512 if dim is None else int(dim))


def _part(table: Mapping[str, Any], name: str) -> Any:
    """The table of a tower. Old files have it twice; then `..._dict` counts, as in transformers."""
    old = table.get(f"{name}_dict")
    return old if old is not None else table.get(name) or {}


def _read(kind: type[TransformerConfig], given: Any, where: str, wrong: list[str]) -> dict[str, Any]:
    """The fields of a configuration that a table gives; adds to `wrong` what cannot be used."""
    if not isinstance(given, dict):
        wrong.append(f"`{where[:-1]}`: expected a table, got {toml_text(given)}")
        return {}
    table, types = cast("dict[str, Any]", given), get_type_hints(kind)
    found: dict[str, Any] = {}
    for name in (each.name for each in fields(kind)):
        value = table.get(name)
        if name in ("image_size", "patch_size"):
            value = _side(value)
        if value is None:
            continue
        if name == "hidden_act":
            if value not in ACTIVATIONS:
                near = did_you_mean(value, ACTIVATIONS) if isinstance(value, str) else ""
                wrong.append(
                    f"`{where}{name}`: expected one of {quoted(ACTIVATIONS)}, got {toml_text(value)}{near}"
                )
        elif types[name] is int:
            least = 0 if name in ("eos_token_id", "num_hidden_layers") else 1
            if not _is_size(value, least):
                wrong.append(f"`{where}{name}`: expected a whole number from {least}, got {toml_text(value)}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            wrong.append(f"`{where}{name}`: expected a number from 0, got {toml_text(value)}")
        found[name] = value
    if not wrong:
        made = kind(**found)
        if made.hidden_size % made.num_attention_heads:
            wrong.append(
                f"`{where}num_attention_heads`: {made.num_attention_heads} heads do not divide a width of {made.hidden_size}"
            )
    return found


def _side(value: Any) -> Any:
    """The side of a square that is written as its height and width."""
    if isinstance(value, list) and len(sides := cast("Sequence[Any]", value)) == 2 and sides[0] == sides[1]:
        return sides[0]
    return cast("Any", value)


def _is_size(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def expect_weights(path: Path, want: Mapping[str, tuple[int, ...]], stored: Checkpoint) -> None:
    """Compares the weights of a folder with the shapes that its `config.json` says.

    Raises:
        InputError: tensors are missing or of another shape; they are listed.
    """
    wrong = [f"lacks tensor `{name}`" for name in sorted(want) if name not in stored.entries]
    wrong += [
        f"`{name}` has another shape than its config says"
        for name, shape in sorted(want.items())
        if name in stored.entries and stored.entries[name].shape != shape
    ]
    if wrong:
        raise InputError(f"{path}: the weights do not fit `config.json`:\n{listed(wrong)}")
