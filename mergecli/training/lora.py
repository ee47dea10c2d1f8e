"""Low-rank adapters for training: peft adds them to a tower, and they are written in its format.

An L-LoRA adapter (Tang et al. 2024, arXiv 2310.04742) is the first-order Taylor expansion of each LoRA layer around its
factors at the start, (A0, B0): W + s (B A0 + B0 A - B0 A0). peft starts at B0 = 0, so it is W + s B A0: A has no gradient
and does not change. So we train a LoRA with a frozen A. That is exact, and needs no product with a Jacobian.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.formats.linear_layers import is_end
from mergecli.formats.lora_config import CONFIG
from mergecli.formats.lora_files import PLAIN
from mergecli.runtime.errors import UsageError, did_you_mean, listed, quoted
from mergecli.storage.atomic import expect_finite, whole_folder
from mergecli.storage.safetensors_writer import save_tensors
from mergecli.training.settings import LowRank

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergecli.clip.model import Clip


def add_adapter(clip: Clip, low_rank: LowRank, seed: int) -> Any:
    """Adds trainable factors to the layers of the CLIP's tower; returns the `peft.PeftModel` around it.

    A is drawn as peft draws it (Kaiming uniform), on the CPU, from the seed; B is zero.

    Raises:
        UsageError: the tower has no such layers, or a side of one is smaller than the rank.
    """
    import torch

    _check(clip, low_rank)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=low_rank.rank,
            lora_alpha=low_rank.alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
            target_modules=list(low_rank.target_modules),
            lora_dropout=low_rank.dropout,
        )
        torch.manual_seed(seed)
        model: Any = get_peft_model(clip.tower, config)  # pyright: ignore[reportArgumentType]
    model.eval()
    if low_rank.linearized:
        for name, parameter in clip.tower.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


def dropouts(tower: nn.Module) -> list[nn.Module]:
    """The dropout of each adapted layer; no other module is ever in training mode."""
    from torch import nn

    return [
        module
        for name, module in tower.named_modules()
        if ".lora_dropout." in name and isinstance(module, nn.Dropout)
    ]


def save_adapter(
    model: Any, clip: Clip, base: str, folder: Path, metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Writes the folder that `PeftModel.save_pretrained` would write, with metadata, and the same bytes every time.

    An L-LoRA adapter has the same layout, so that plain peft loads it: it adds s B A either way. The metadata key
    `adapter` says that it was linearized.

    Args:
        clip: whose tower the adapter is of.
        base: its name in the configuration.
    """
    from peft import get_peft_model_state_dict

    state = {
        name: tensor.detach().cpu().to(dtype) for name, tensor in get_peft_model_state_dict(model).items()
    }
    expect_finite(state, folder, "train with a lower learning rate")
    with whole_folder(folder) as written:
        text = json.dumps(_config(model, clip, base), indent=2, sort_keys=True) + "\n"
        (written / CONFIG).write_text(text, encoding="utf-8")
        save_tensors({name: state[name].contiguous() for name in sorted(state)}, written / PLAIN, metadata)


def _config(model: Any, clip: Clip, base: str) -> dict[str, Any]:
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    alpha = config["lora_alpha"]
    config |= {
        "auto_mapping": _module_of(clip),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    }
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _module_of(clip: Clip) -> dict[str, str]:
    """What peft puts the adapter on: the module that transformers has for the tower."""
    from mergecli.clip.dual_encoder import vision_class

    if clip.is_clip:
        return {
            "base_model_class": "CLIPVisionModel",
            "parent_library": "transformers.models.clip.modeling_clip",
        }
    _, found = vision_class(clip.path)
    return {"base_model_class": found.__name__, "parent_library": found.__module__}


def _check(clip: Clip, low_rank: LowRank) -> None:
    """Raises UsageError unless the tower has the layers and they are large enough."""
    from torch import nn

    linear = {name: module for name, module in clip.tower.named_modules() if isinstance(module, nn.Linear)}
    ends = {name.rpartition(".")[2] for name in linear}
    unknown = [
        wanted for wanted in low_rank.target_modules if not any(is_end(wanted, name) for name in linear)
    ]
    if unknown:
        raise UsageError(
            f"{clip.path}: has no linear layer {quoted(unknown)}{did_you_mean(unknown[0], ends)}",
            f"its linear layers are {quoted(sorted(ends))}",
        )
    small = [
        f"`{name}` is {module.out_features} x {module.in_features}"
        for name, module in linear.items()
        if any(is_end(wanted, name) for wanted in low_rank.target_modules)
        and low_rank.rank > min(module.out_features, module.in_features)
    ]
    if small:
        raise UsageError(f"`rank`: {low_rank.rank} is more than a side of these layers:\n{listed(small)}")
