"""The configuration of a low-rank adapter as peft writes it: read and checked, never assumed."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mergecli.runtime.errors import InputError, listed, quoted, toml_text
from mergecli.storage.table_reader import TableReader

if TYPE_CHECKING:
    import regex

CONFIG = "adapter_config.json"
MERGE_WITH_PEFT = "merge it into its base with peft (`merge_and_unload`) and save that as safetensors"
AGAIN = "copy or fetch the adapter again"

_ONLY_FOR_TRAINING = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules",
    "use_dora", "use_rslora",
}  # fmt: skip
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


SECONDS = 5.0
"""For all regular expressions of a file together; sound ones take microseconds."""


@dataclass
class _Seconds:
    """Time that is left for the regular expressions of a file."""

    left: float


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says that matters for the weights. Modules are called as the adapter calls them."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    """Whether the scaling is alpha / sqrt(rank) and not alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool
    fan_in_fan_out: bool
    bias: Literal["none", "all", "lora_only"]
    lora_bias: bool
    target_modules: str | tuple[str, ...] | None
    """Names or their ends; or a regular expression; None where nothing is said."""
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    base: str | None
    """What it was trained on, as it says itself."""
    seconds: _Seconds = field(default_factory=lambda: _Seconds(SECONDS), compare=False)

    def rank_of(self, module: str) -> int:
        """The rank of one module's factors."""
        return self._matching(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        """s in W + s B A."""
        rank = self.rank_of(module)
        return self._matching(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def saves(self, module: str) -> bool:
        """Whether the module's own weights are in the adapter, whole."""
        return any(self._match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def targets(self, module: str, *, is_linear: bool) -> bool | None:
        """Whether the module has low-rank factors, by peft's own rules; None where the configuration does not say."""
        if self._names(self.exclude_modules, module) or self.saves(module):
            return False
        if self.target_modules is None:
            return None
        if self.target_modules == "all-linear":
            return is_linear
        if not self._names(self.target_modules, module):
            return False
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){name}\." for name in self.layers_pattern] or [r".*?\.[^.]*\."]
        found = next((hit for each in patterns if (hit := self._match(rf"{each}(\d+)\.", module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform

    def _matching(self, pattern: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first key that matches the end of the module's name, as a regular expression."""
        for key, value in pattern.items():
            if self._match(rf"(.*\.)?({key})$", module):
                return value
        return default

    def _names(self, names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return bool(names and self._match(names, module, whole=True))
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _match(self, expression: str, module: str, *, whole: bool = False) -> regex.Match[str] | None:
        """The match of an expression, which the file brought, at the beginning of a module's name, or with the whole.

        Raises:
            InputError: the time that all expressions of the file have together is over. Some take longer for each letter
                of a name than for all before it; `re` could not be stopped.
        """
        import regex

        begun = time.monotonic()
        try:
            match = regex.fullmatch if whole else regex.match
            return match(expression, module, timeout=max(self.seconds.left, 1e-3))
        except TimeoutError as error:
            raise InputError(
                f"{self.path}: a regular expression takes too long: `{expression[:200]}` on `{module[:200]}`",
                "write the names of the modules as a list",
            ) from error
        except regex.error as error:
            raise InputError(f"{self.path}: `{expression[:200]}`: {error}") from error
        finally:
            self.seconds.left -= time.monotonic() - begun


def read_config(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in a folder.

    Raises:
        InputError: it is missing or damaged, or the adapter is of a kind that cannot be written as W + s B A; every
            setting that is wrong or refused is named.
    """
    path = folder / CONFIG
    try:
        table: Any = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: is not an adapter: it has no `{CONFIG}`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {(error.strerror or '').lower()}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not an adapter's configuration: it is not JSON", AGAIN) from error
    if not isinstance(table, dict):
        raise InputError(f"{path}: is not an adapter's configuration: expected a table", AGAIN)
    given = cast("dict[str, Any]", table)
    if given.get("peft_type") != "LORA":
        raise InputError(
            f'{path}: `peft_type`: expected "LORA", got {toml_text(given.get("peft_type"))}', MERGE_WITH_PEFT
        )
    known = _READ | _ONLY_FOR_TRAINING
    refused = [f"{key} = {toml_text(value)}" for key, value in given.items() if value and key not in known]
    if refused:
        raise InputError(f"{path}: is not a plain LoRA: {quoted(refused)}", MERGE_WITH_PEFT)
    if (init := given.get("init_lora_weights")) not in _HARMLESS_INITS:
        raise InputError(
            f"{path}: `init_lora_weights` = {toml_text(init)}: training has changed the base's weights too",
            "save it with peft's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA",
        )
    read = TableReader()
    bias = read.one_of(given.get("bias") or "none", "bias", ("none", "all", "lora_only"))
    config = AdapterConfig(
        path=path,
        rank=read.whole(given.get("r"), "r", 1),
        alpha=read.number(given.get("lora_alpha"), "lora_alpha"),
        rank_pattern={
            name: read.whole(each, "rank_pattern", 1) for name, each in _patterns(given, "rank_pattern", read)
        },
        alpha_pattern={
            name: read.number(each, "alpha_pattern") for name, each in _patterns(given, "alpha_pattern", read)
        },
        use_rslora=read.flag(given.get("use_rslora") or False, "use_rslora"),
        use_dora=read.flag(given.get("use_dora") or False, "use_dora"),
        fan_in_fan_out=read.flag(given.get("fan_in_fan_out") or False, "fan_in_fan_out"),
        bias=cast('Literal["none", "all", "lora_only"]', bias),
        lora_bias=read.flag(given.get("lora_bias") or False, "lora_bias"),
        target_modules=_modules(given, "target_modules", read) if given.get("target_modules") else None,
        exclude_modules=_modules(given, "exclude_modules", read),
        layers_to_transform=_layers(given.get("layers_to_transform"), read),
        layers_pattern=_several(given, "layers_pattern", read),
        modules_to_save=_several(given, "modules_to_save", read),
        base=str(given["base_model_name_or_path"]) if given.get("base_model_name_or_path") else None,
    )
    if read.problems:
        lines = [str(problem) for problem in read.problems]
        raise InputError(f"{path}: is damaged:\n{listed(lines)}", AGAIN)
    return config


def _patterns(given: Mapping[str, Any], key: str, read: TableReader) -> list[tuple[str, Any]]:
    """The items of a table whose keys are regular expressions."""
    table = read.table(given.get(key) or {}, key)
    return [(name, each) for name, each in table.items() if _is_expression(name, key, read)]


def _modules(given: Mapping[str, Any], key: str, read: TableReader) -> str | tuple[str, ...]:
    """A regular expression, or names of modules or their ends, which are expressions too."""
    value: Any = given.get(key) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast("list[Any]", names)):
        read.expected(key, "a list of names", value)
        return ()
    found = tuple(name for name in cast("list[str]", names) if _is_expression(name, key, read))
    return (found[0] if found else "") if isinstance(value, str) else found


def _several(given: Mapping[str, Any], key: str, read: TableReader) -> tuple[str, ...]:
    names = _modules(given, key, read)
    return (names,) if isinstance(names, str) else names


def _layers(value: Any, read: TableReader) -> tuple[int, ...]:
    numbers: Any = [value] if isinstance(value, int) else value or []
    if not isinstance(numbers, list):
        read.expected("layers_to_transform", "a list of whole numbers", value)
        return ()
    return tuple(read.whole(each, "layers_to_transform") for each in cast("list[Any]", numbers))


def _is_expression(text: str, key: str, read: TableReader) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        read.expected(key, f"a regular expression ({error})", text)
        return False
    return True
