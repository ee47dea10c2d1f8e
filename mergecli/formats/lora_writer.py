"""Adapters written as plain peft loads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.formats.linear_layers import is_end, modules_of
from mergecli.formats.lora import Kind
from mergecli.formats.lora_config import CONFIG
from mergecli.formats.lora_files import PLAIN, base_name
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.sources import Source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The factors of one module's change, B A: (O, k) and (k, I)."""

    left: Tensor
    right: Tensor
    kind: Kind = "linear"
    filters: tuple[int, ...] = ()
    """Of a convolution: the shape of one filter, which is a row of A."""

    @property
    def rank(self) -> int:
        return len(self.right)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Key -> factor, as peft calls and shapes it for a module of that kind."""
        lead = f"base_model.model.{module}.lora_"
        if self.kind == "embedding":
            return {
                f"{lead}embedding_A": self.left.T.contiguous(),
                f"{lead}embedding_B": self.right.T.contiguous(),
            }
        left, right = self.left.contiguous(), self.right.contiguous()
        if self.kind == "convolution":
            left = left.view(*left.shape, *[1] * (len(self.filters) - 1))
            right = right.view(self.rank, *self.filters)
        return {f"{lead}A.weight": right, f"{lead}B.weight": left}


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    reference: Checkpoint,
    base: Source | None,
    metadata: Mapping[str, str],
    biases: Mapping[str, Tensor] | None = None,
) -> str:
    """Writes weights and configuration into the folder, and gives the digest of the weights.

    Args:
        factors: module -> its factors, all in one dtype.
        reference: the model whose modules they are.
        base: where that comes from.
        biases: name -> values, of those that take the place of the base's.
    """
    biases = biases or {}
    tensors = {key: each for module, own in factors.items() for key, each in own.tensors(module).items()}
    tensors |= {bias_key(name, factors): each for name, each in biases.items()}
    layout = {
        key: (SAFETENSORS_NAMES[str(each.dtype).removeprefix("torch.")], tuple(each.shape))
        for key, each in tensors.items()
    }
    config = _config(reference, base, {module: each.rank for module, each in factors.items()})
    config |= {"bias": "all"} if biases else {}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with SafetensorsWriter(folder / PLAIN, layout, metadata) as writer:
        for key, factor in tensors.items():
            writer.write(key, factor)
    return writer.digest


def bias_key(name: str, modules: Collection[str]) -> str:
    """What peft calls a bias: that of a module with factors is inside of the layer around it."""
    module = name.removesuffix(".bias")
    return f"base_model.model.{module}{'.base_layer' if module in modules else ''}.bias"


def _config(reference: Checkpoint, base: Source | None, ranks: Mapping[str, int]) -> dict[str, object]:
    """The adapter's configuration: every alpha is the rank, so that the factors are not scaled."""
    ends = sorted({module.rpartition(".")[2] for module in ranks})
    by_ends = {
        module
        for module in modules_of(reference, range(1, 9)).values()
        if any(is_end(each, module) for each in ends)
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: each for module, each in ranks.items() if each != rank}
    return {
        "alpha_pattern": others,
        "base_model_name_or_path": base_name(base) if base else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "target_modules": ends if by_ends == set(ranks) else sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
    }
