"""What a fine-tuning can be told, checked before any work; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mergecli.formats.lora_files import check_adapter_folder
from mergecli.runtime.errors import UsageError, listed, quoted
from mergecli.storage.atomic import check_target

SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LowRank:
    """A low-rank adapter that is trained in the tower's stead: LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    linearized: bool = False
    """Whether it is trained in its tangent space: L-LoRA (Tang et al. 2024, arXiv 2310.04742)."""
    rank: int = 16
    alpha: float = 32
    """The factors' product is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of linear layers, or their ends."""
    dropout: float = 0.1
    """Share of a layer's inputs that the factors do not see in training."""

    @property
    def option(self) -> str:
        """The option that asks for it."""
        return "--l-lora" if self.linearized else "--lora"

    @property
    def kind(self) -> str:
        """What its file says it is."""
        return "linearized LoRA" if self.linearized else "LoRA"

    @classmethod
    def of(cls, lora: bool, l_lora: bool, **given: Any) -> LowRank | None:
        """The adapter with what is given of rank, alpha, target modules and dropout; None if none is asked for.

        Raises:
            UsageError: both kinds are asked for; or neither, and something is given.
        """
        known = {name: value for name, value in given.items() if value is not None}
        if lora and l_lora:
            raise UsageError("expected one of `--lora` and `--l-lora`, got both")
        if lora or l_lora:
            names = known.get("target_modules", cls.target_modules)
            known["target_modules"] = (names,) if isinstance(names, str) else tuple(names)
            return cls(linearized=l_lora, **known)
        if known:
            options = {"dropout": "lora_dropout"}
            raise UsageError(
                f"{quoted(options.get(name, name) for name in known)}: only low-rank adapters have it",
                "give `--lora` or `--l-lora` too",
            )
        return None

    @property
    def problems(self) -> list[str]:
        """A line for every value that cannot be."""
        wrong: list[str] = []
        if not _is_count(self.rank):
            wrong.append(f"`rank`: expected a whole number of at least 1, got {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            wrong.append(f"`alpha`: expected a number above 0, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"`lora_dropout`: expected a number in [0, 1), got {self.dropout!r}")
        if not self.target_modules or not all(self.target_modules):
            wrong.append("`target_modules`: expected names of linear layers, such as q_proj")
        return wrong


MOST = 1e30
"""The largest learning rate: float32 holds what it makes of a gradient of 1."""


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on, but for base and images."""

    steps: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    schedule: str
    seed: int
    dtype: str
    """Of the weights that are written."""
    accumulate: int = 1
    """Batches of each task that make a step."""
    precision: str = "float32"
    """What the tower computes in; its weights are float32."""
    low_rank: LowRank | None = None
    validate_every: int = 0
    """Steps between validations; 0 for none."""
    processes: int = 1

    @property
    def told(self) -> dict[str, Any]:
        """The settings as files record them: what is as always is left out, but for the oldest ones."""
        always = {field.name for field in fields(self)[:7]}
        usual = replace(self, accumulate=1, precision="float32", low_rank=None, validate_every=0, processes=1)
        told = {
            name: value
            for name, value in asdict(self).items()
            if name in always or value != getattr(usual, name)
        }
        if self.low_rank is not None:
            told["low_rank"] = {"method": self.low_rank.option.removeprefix("--"), **told["low_rank"]}
        return told

    @property
    def images_a_step(self) -> int:
        """Of each task, in all processes together."""
        return self.batch_size * self.accumulate * self.processes

    def rate(self, step: int) -> float:
        """The learning rate of a step, which is counted from 0."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def validates(self, step: int) -> bool:
        """Whether the weights after so many steps are validated: every so often, and at the end."""
        every = self.validate_every
        return bool(every) and step > 0 and (step % every == 0 or step >= self.steps)

    def check(self, save_every: int, device: str) -> None:
        """Raises UsageError that lists every setting that cannot be."""
        counts = {name: getattr(self, name) for name in ("steps", "batch_size", "accumulate")}
        counts["save_every"] = save_every
        wrong = [
            f"`{name}`: expected a whole number of at least 1, got {value!r}"
            for name, value in counts.items()
            if not _is_count(value)
        ]
        if self.validate_every != 0 and not _is_count(self.validate_every):
            wrong.append(
                f"`validate_every`: expected a whole number of at least 0, got {self.validate_every!r}"
            )
        if not (_is_count(self.seed + 1) and self.seed < 1 << 63):
            wrong.append(f"`seed`: expected a whole number from 0 to 2^63 - 1, got {self.seed!r}")
        if not 0 < self.learning_rate <= MOST:
            wrong.append(
                f"`learning_rate`: expected a number above 0, at most {MOST:g}, got {self.learning_rate!r}"
            )
        if not 0 <= self.weight_decay < math.inf:
            wrong.append(f"`weight_decay`: expected a number of at least 0, got {self.weight_decay!r}")
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                wrong.append(f"`{name}`: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.precision == "float16" and not device.startswith("cuda"):
            wrong.append(f"`precision`: float16 needs a GPU, and the device is `{device}`; bfloat16 does not")
        if self.low_rank is not None:
            wrong += self.low_rank.problems
        if wrong:
            raise UsageError(f"fine-tuning cannot be done so:\n{listed(wrong, 20)}")


def last_good(output: Path) -> Path:
    """Where the weights are written that a training had when its numbers were last good: `NAME.last-good`."""
    suffix = ".safetensors" if output.suffix == ".safetensors" else ""
    return output.with_name(f"{output.name.removesuffix(suffix)}.last-good{suffix}")


def check_output(target: Path, low_rank: LowRank | None) -> None:
    """Raises UsageError unless what is trained can be written there: an adapter is a folder, a tower may be a file."""
    if low_rank is None and target.suffix not in ("", ".safetensors"):
        raise UsageError(f"{target}: expected a `.safetensors` file, or a folder's name without suffix")
    for each in (target, last_good(target)):
        if low_rank is None:
            check_target(each, folder=not target.suffix)
        else:
            check_adapter_folder(each)


def modules_of(written: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names in `q_proj,v_proj`, or in a list of them; None if nothing is written."""
    if written is None:
        return None
    return tuple(name.strip() for name in (written.split(",") if isinstance(written, str) else written))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
