"""The configuration of a CLIP in a folder of open_clip, as those of transformers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mergecli.runtime.errors import InputError, listed, toml_text

NAME = "open_clip_config.json"
_OURS = "config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""open_clip's name of a filter -> PIL's number."""
_OF_BOTH = {"block_type": ("default",)}
_KNOWN: Mapping[str, Mapping[str, Collection[Any]]] = {
    "": {},
    "vision_cfg": {**_OF_BOTH, "pool_type": ("tok",), "pos_embed_type": ("learnable",)},
    "text_cfg": {**_OF_BOTH, "pool_type": ("argmax",), "proj_type": ("linear",)},
}
"""Values besides nothing and `false` that mean OpenAI's architecture."""
_USED: Mapping[str, Collection[str]] = {
    "": ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg"),
    "vision_cfg": ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "norm_kwargs"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"),
}
_WITHOUT_EFFECT: Mapping[str, Collection[str]] = {
    "": ("init_logit_scale", "custom_text", "nonscalar_logit_scale", "cast_dtype", "output_dict"),
    "vision_cfg": ("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj"),
    "text_cfg": ("hf_tokenizer_name", "pad_id", "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type",
                 "hf_pooler_type"),
}  # fmt: skip
"""Keys that mean nothing for OpenAI's architecture, once it is trained."""


def lacks_config(folder: Path) -> bool:
    """Whether a folder has only open_clip's configuration of a CLIP."""
    return (folder / NAME).is_file() and not (folder / _OURS).is_file()


def transformers_config(folder: Path) -> dict[str, str]:
    """Name -> content of the files that such a folder lacks: `config.json`, and `preprocessor_config.json` if there is none.

    open_clip takes the text's feature where the token is largest; transformers does so where the end is token 2.

    Raises:
        InputError: the file is damaged, or is of another architecture than OpenAI's.
    """
    file = folder / NAME
    try:
        table: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON: {str(error).splitlines()[0]}") from error
    model, processing = (_part(table, key) for key in ("model_cfg", "preprocess_cfg"))
    parts = {"": model, "vision_cfg": _part(model, "vision_cfg"), "text_cfg": _part(model, "text_cfg")}
    problems = [line for name, part in parts.items() for line in _foreign(name, part)]
    if processing.get("resize_mode", "shortest") not in ("shortest", "squash"):
        problems.append(f"`preprocess_cfg.resize_mode` is {toml_text(processing['resize_mode'])}")
    if processing.get("interpolation", "bicubic") not in _FILTERS:
        problems.append(f"`preprocess_cfg.interpolation` is {toml_text(processing['interpolation'])}")
    if problems:
        raise InputError(
            f"{file}: is not of OpenAI's architecture, and cannot be evaluated:\n{listed(problems)}",
            "its weights can be merged with others of its kind as they are",
        )
    try:
        found = {_OURS: _config(parts)}
        if not any((folder / name).is_file() for name in _PROCESSORS):
            found[_PROCESSORS[0]] = _processor(processing, parts["vision_cfg"].get("image_size", 224))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{file}: has values that cannot be used: {error}") from error
    return {name: json.dumps(each, indent=2, sort_keys=True) + "\n" for name, each in found.items()}


def _part(table: Any, key: str) -> dict[str, Any]:
    found: Any = cast("dict[str, Any]", table).get(key) if isinstance(table, dict) else None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _foreign(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    """What of a part is not OpenAI's architecture."""
    for key, value in part.items():
        is_network = key == "layers" and isinstance(value, list)  # of a ResNet, which has several stages
        if not is_network and (
            key in _USED[name] or key in _WITHOUT_EFFECT[name] or value in (None, False, {})
        ):
            continue
        if value not in _KNOWN[name].get(key, ()):
            yield f"`{'.'.join(filter(None, (name, key)))}` is {toml_text(value)}"


def _config(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where a value is missing, open_clip's own default."""
    model, vision, text = parts[""], parts["vision_cfg"], parts["text_cfg"]
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

    def tower(part: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": int(width * part.get("mlp_ratio", 4.0)),
            "num_hidden_layers": part.get("layers", 12),
            "num_attention_heads": heads,
            "hidden_act": activation,
            "layer_norm_eps": (part.get("norm_kwargs") or {}).get("eps", 1e-5),
            "projection_dim": model.get("embed_dim", 512),
        }

    width, text_width = vision.get("width", 768), text.get("width", 512)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.get("embed_dim", 512),
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower(vision, width, width // vision.get("head_width", 64)),
            "image_size": _side(vision.get("image_size", 224)),
            "patch_size": _side(vision.get("patch_size", 16)),
        },
        "text_config": {
            "model_type": "clip_text_model",
            **tower(text, text_width, text.get("heads", 8)),
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    }


def _processor(processing: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    side = _side(processing.get("size", image_size))
    square = {"height": side, "width": side}
    is_cropped = processing.get("resize_mode", "shortest") == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if is_cropped else square,
        "resample": _FILTERS[processing.get("interpolation", "bicubic")],
        "do_center_crop": is_cropped,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": processing.get("mean", [0.48145466, 0.4578275, 0.40821073]),
        "image_std": processing.get("std", [0.26862954, 0.26130258, 0.27577711]),
        "do_convert_rgb": True,
    }


def _side(value: Any) -> int:
    """The side of a square, which may be written twice."""
    sides: list[Any] = list(cast("list[Any]", value)) if isinstance(value, list) else [value, value]
    if len(sides) not in (1, 2) or sides[0] != sides[-1] or not isinstance(sides[0], int):
        raise ValueError(f"expected the side of a square, got {toml_text(value)}")
    return sides[0]
