"""Settings of a fine-tuning, checked before any work; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mergecli.formats.lora_files import check_adapter_folder
from mergecli.runtime.counts import is_count
from mergecli.runtime.errors import UsageError, listed, quoted
from mergecli.storage.atomic import check_target

SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LowRank:
    """A low-rank adapter that is trained instead of the tower: LoRA (Hu et al. 2021, arXiv 2106.09685)."""

    linearized: bool = False
    """Whether it is trained in its tangent space: L-LoRA (Tang et al. 2024, arXiv 2310.04742)."""
    rank: int = 16
    alpha: float = 32
    """The product of the factors is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of linear layers, or the ends of their names."""
    dropout: float = 0.1
    """Probability with which training zeroes an input of the factors."""

    @property
    def option(self) -> str:
        """The option of the command line."""
        return "--l-lora" if self.linearized else "--lora"

    @property
    def kind(self) -> str:
        """The kind of adapter, as its file records it."""
        return "linearized LoRA" if self.linearized else "LoRA"

    @classmethod
    def of(cls, lora: bool, l_lora: bool, **given: Any) -> LowRank | None:
        """The adapter; None if neither kind is asked for. What is not given of rank, alpha, ... is the default.

        Raises:
            UsageError: both kinds are asked for; or neither, but one of their settings is given.
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
        """A line for each invalid value."""
        wrong: list[str] = []
        if not is_count(self.rank):
            wrong.append(f"`rank`: expected a whole number, at least 1, got {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            wrong.append(f"`alpha`: expected a number above 0, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"`lora_dropout`: expected a number in [0, 1), got {self.dropout!r}")
        if not self.target_modules or not all(self.target_modules):
            wrong.append("`target_modules`: expected names of linear layers, such as q_proj")
        return wrong


MAX_LEARNING_RATE = 1e30
"""The largest learning rate: an update by a gradient of 1 still fits into float32."""
MIN_EPSILON = 1e-30
"""The smallest epsilon of Adam, and the inverse of the largest: in float32 neither is 0, a NaN where gradients vanish, or infinite."""


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on, except base and images."""

    steps: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    schedule: str
    seed: int
    dtype: str
    """Of the written weights."""
    accumulate: int = 1
    """Batches of each task per step."""
    precision: str = "float32"
    """The dtype of the forward pass; the weights are float32."""
    low_rank: LowRank | None = None
    validate_every: int = 0
    """Steps between validations; 0 means no validation."""
    warmup: int = 0
    """Steps over which the learning rate rises from near 0."""
    epsilon: float = 1e-8
    """Adam's: a weight with smaller gradients moves less than the learning rate."""
    processes: int = 1

    @property
    def as_metadata(self) -> dict[str, Any]:
        """The settings as files record them. The first seven are always there, the others where they are not the default."""
        always = {field.name for field in fields(self)[:7]}
        defaults = replace(
            self,
            accumulate=1,
            precision="float32",
            low_rank=None,
            validate_every=0,
            warmup=0,
            epsilon=1e-8,
            processes=1,
        )
        recorded = {
            name: value
            for name, value in asdict(self).items()
            if name in always or value != getattr(defaults, name)
        }
        if self.low_rank is not None:
            method = self.low_rank.option.removeprefix("--")
            recorded["low_rank"] = {"method": method, **recorded["low_rank"]}
        return recorded

    @property
    def images_per_step(self) -> int:
        """Images of each task in one step, over all processes."""
        return self.batch_size * self.accumulate * self.processes

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step; the first step is 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def validates_at(self, step: int) -> bool:
        """Whether the weights after `step` steps are validated: every `validate_every` steps and at the end."""
        every = self.validate_every
        return bool(every) and step > 0 and (step % every == 0 or step >= self.steps)

    def check(self, save_every: int, device: str) -> None:
        """Raises one UsageError that lists every invalid setting."""
        counts = {name: getattr(self, name) for name in ("steps", "batch_size", "accumulate")}
        counts["save_every"] = save_every
        wrong = [
            f"`{name}`: expected a whole number, at least 1, got {value!r}"
            for name, value in counts.items()
            if not is_count(value)
        ]
        if not is_count(self.validate_every, 0):
            wrong.append(
                f"`validate_every`: expected a whole number, at least 0, got {self.validate_every!r}"
            )
        if not is_count(self.warmup, 0):
            wrong.append(f"`warmup`: expected a whole number, at least 0, got {self.warmup!r}")
        elif is_count(self.steps) and self.warmup >= self.steps:
            wrong.append(f"`warmup`: expected fewer than the {self.steps} steps, got {self.warmup}")
        if not (is_count(self.seed, 0) and self.seed < 1 << 63):
            wrong.append(f"`seed`: expected a whole number from 0 to 2^63 - 1, got {self.seed!r}")
        if not 0 < self.learning_rate <= MAX_LEARNING_RATE:
            wrong.append(
                f"`learning_rate`: expected a number above 0, at most {MAX_LEARNING_RATE:g}, got {self.learning_rate!r}"
            )
        if not 0 <= self.weight_decay < math.inf:
            wrong.append(f"`weight_decay`: expected a number of at least 0, got {self.weight_decay!r}")
        if not MIN_EPSILON <= self.epsilon <= 1 / MIN_EPSILON:
            wrong.append(
                f"`epsilon`: expected a number from {MIN_EPSILON:g} to {1 / MIN_EPSILON:g}, got {self.epsilon!r}"
            )
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                wrong.append(f"`{name}`: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.precision == "float16" and not device.startswith("cuda"):
            wrong.append(f"`precision`: float16 needs a GPU, and the device is `{device}`; bfloat16 does not")
        if self.low_rank is not None:
            wrong += self.low_rank.problems
        if wrong:
            raise UsageError(wrong[0] if len(wrong) == 1 else f"invalid settings:\n{listed(wrong, 20)}")


def last_good_path(output: Path) -> Path:
    """The file of the last finite weights of a diverged training: `NAME.last-good`."""
    suffix = ".safetensors" if output.suffix == ".safetensors" else ""
    return output.with_name(f"{output.name.removesuffix(suffix)}.last-good{suffix}")


def check_output(target: Path, low_rank: LowRank | None) -> None:
    """Raises UsageError unless the output can be written there. An adapter is a folder; a tower may be a file."""
    if low_rank is None and target.suffix not in ("", ".safetensors"):
        raise UsageError(f"{target}: expected a `.safetensors` file, or a folder's name without suffix")
    for each in (target, last_good_path(target)):
        if low_rank is None:
            check_target(each, folder=not target.suffix)
        else:
            check_adapter_folder(each)


def parse_modules(written: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names in `q_proj,v_proj` or in a list; None stays None."""
    if written is None:
        return None
    return tuple(name.strip() for name in (written.split(",") if isinstance(written, str) else written))
