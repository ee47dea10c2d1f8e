"""Adapters on disk: which files, and which of their tensors is which factor of which module."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergecli.formats.lora_config import AGAIN, CONFIG, MERGE_WITH_PEFT, AdapterConfig, read_config
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, listed
from mergecli.storage.atomic import check_target
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.safetensors_format import pickle_hint
from mergecli.storage.sources import HUBS, Source

PLAIN = "adapter_model.safetensors"
LINEARIZED = "linearized_adapter_model.safetensors"
"""The published layout of adapters that were trained in the tangent space (Tang et al. 2024, arXiv 2310.04742)."""

_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?P<bias>\.bias)?(?:\.weight)?"
)
_ORIGIN = re.compile(r"(?P<module>.+?)\.params0_values\.(?P<number>\d+)")
_WRAPPED = re.compile(r"\.base_layer(?=\.bias$)|\.modules_to_save(\.default)?(?=\.)")
_ORIGINAL = re.compile(r"\.original_module(?=\.)")
"""What peft keeps of a module that the adapter has whole under another name, where all biases are trained."""
_VECTORS = {"B.bias", "magnitude_vector"}


@dataclass(frozen=True)
class Adapter:
    """An open adapter: its configuration, and where its tensors are. Modules are called as the adapter calls them."""

    config: AdapterConfig
    stored: Checkpoint
    modules: Mapping[str, Mapping[str, str]]
    """Module -> part (`A`, `B`, `A0`, `B0`, `B.bias`, `embedding_A`, `embedding_B`, `magnitude_vector`) -> key."""
    whole: Mapping[str, str]
    """Name of a tensor that replaces the base's -> key."""
    is_linearized: bool

    @property
    def kind(self) -> str:
        """LoRA, DoRA or linearized LoRA."""
        return "linearized LoRA" if self.is_linearized else "DoRA" if self.config.use_dora else "LoRA"


def is_adapter(path: Path) -> bool:
    """Whether the path is an adapter's folder, or the file of weights in one; a folder with a model is a model's."""
    folder = _folder(path)
    models = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and (path != folder or not any(file.exists() for file in models))


def _folder(path: Path) -> Path:
    return path.parent if path.name in (PLAIN, LINEARIZED) else path


def open_adapter(path: Path) -> Adapter:
    """The adapter in a folder, as peft writes it or in the published layout of linearized adapters.

    Raises:
        InputError: it is missing or damaged, or it is not a LoRA that can be merged; every reason is named.
    """
    folder = _folder(path)
    config = read_config(folder)
    is_linearized = (folder / LINEARIZED).exists()
    if not is_linearized and not (folder / PLAIN).exists():
        if list(folder.glob("*.bin")):
            raise InputError(
                f"{folder}: has only pickled weights, and a pickle is not opened as it is",
                pickle_hint(folder),
            )
        raise InputError(f"{folder}: has no `{PLAIN}`", AGAIN)
    stored = open_checkpoint(folder / (LINEARIZED if is_linearized else PLAIN))
    modules: dict[str, dict[str, str]] = {}
    origins: dict[str, dict[int, str]] = {}
    whole: dict[str, str] = {}
    names: set[str] = set()
    for key in stored.entries:
        name = key.removeprefix("base_model.model.")
        if is_linearized:
            name = name.replace(".model.lora_", ".lora_")
        if factor := _FACTOR.fullmatch(name):
            modules.setdefault(factor["module"], {})[factor["part"] + (factor["bias"] or "")] = key
            names.add(factor["adapter"] or "")
        elif is_linearized and (origin := _ORIGIN.fullmatch(name)):
            origins.setdefault(origin["module"], {})[int(origin["number"])] = key
        elif not (_ORIGINAL.search(name) and config.saves(_ORIGINAL.sub("", name))):
            whole[_WRAPPED.sub("", name)] = key
    for module, values in origins.items():
        # numbers stand for the parameters of a layer in order: its weight and bias have some too, and are not stored
        for index, number in enumerate(sorted(values)):
            part = ("A0", "B0")[index] if index < 2 else f"params0_values.{number}"
            modules.setdefault(module, {})[part] = values[number]
    adapter = Adapter(config, stored, modules, whole, is_linearized)
    problems = [f"holds several adapters: {', '.join(sorted(names))}"] if len(names) > 1 else []
    problems += _damage(adapter)
    if problems:
        stored.close()
        raise InputError(f"{stored.path}: is not a whole LoRA:\n{listed(problems)}", MERGE_WITH_PEFT)
    return adapter


def _damage(adapter: Adapter) -> Iterator[str]:
    """What is wrong with the adapter, whatever the base."""
    config = adapter.config
    if not adapter.modules and not adapter.whole:
        yield "holds no factors"
    if adapter.is_linearized and (config.use_dora or config.lora_bias):
        yield "`use_dora` and `lora_bias` are not linearized by this layout"
    for module, parts in adapter.modules.items():
        is_embedding = any(part.startswith("embedding") for part in parts)
        expected = {"embedding_A", "embedding_B"} if is_embedding else {"A", "B"}
        if adapter.is_linearized:
            expected |= {"A0", "B0"}
        if config.lora_bias and not is_embedding:
            expected.add("B.bias")
        if config.use_dora:
            expected.add("magnitude_vector")
        if is_embedding and (config.use_dora or adapter.is_linearized):
            yield f"`{module}`: an embedding with `use_dora`, or linearized, is not merged"
        yield from (f"`{module}`: lacks `{_spelled(part)}`" for part in sorted(expected - parts.keys()))
        yield from (
            f"`{module}`: has an extra `{_spelled(part)}`" for part in sorted(parts.keys() - expected)
        )
        rank = config.rank_of(module)
        for part in sorted((expected & parts.keys()) - _VECTORS):
            entry = adapter.stored.entries[parts[part]]
            axis = 0 if part in ("A", "A0", "embedding_A") else 1
            if len(entry.shape) < 2 or entry.shape[axis] != rank:
                yield f"`{module}`: `{_spelled(part)}` has shape {entry.shape}, the configuration says rank {rank}"


def _spelled(part: str) -> str:
    """The part as the file calls it."""
    if part in ("A0", "B0"):
        return f"params0_values (lora_{part[0]})"
    return part if part.startswith("params") else f"lora_{part}"


def check_adapter_folder(target: Path) -> None:
    """Raises UsageError unless the folder may become an adapter's: a model in it would be read instead."""
    if target.suffix == ".safetensors":
        raise UsageError(f"{target}: an adapter is a folder", "name one, without suffix")
    check_target(target, folder=True)
    for name in ("model.safetensors", "model.safetensors.index.json", LINEARIZED):
        if (target / name).exists():
            raise UsageError(f"{target}: has a `{name}`, which would be read instead", "name a new folder")


_HINT = (
    "name the base that it was made on, with `--base` or with `base = ...` in the recipe; what it changes goes to "
    "another base as a task vector (`mergecli taskvector`)"
)


def base_name(source: Source) -> str:
    """What an adapter's configuration calls its base: a repository that peft finds on the hub, else the label."""
    return source.name if source.kind == "hf" else source.label


def expect_base(adapter: Adapter, base: Checkpoint, source: Source) -> None:
    """Compares what the adapter says of its base with the one that it is put on, and that `source` names.

    Adapters that this program wrote have the digest of the base's vision tower; of others the name is all there is, and
    where both are names of a hub that end differently, that is a warning.

    Raises:
        InputError: the digest is another.
    """
    origin, name = inputs_of(adapter.stored.metadata).get("base"), adapter.config.base
    if origin is not None:
        own = base.vision().digest()
        if own != origin:
            made_on = f"{name} ({origin})" if name else origin
            raise InputError(_foreign(adapter, made_on, f"{source.label} ({own})"), _HINT)
        return
    theirs, ours = _repository(name or ""), _repository(str(source)) if source.kind in HUBS else None
    if theirs and ours and theirs.rpartition("/")[2].lower() != ours.rpartition("/")[2].lower():
        warnings.warn(_foreign(adapter, theirs, source.label), MergecliWarning, stacklevel=2)


def _foreign(adapter: Adapter, expected: str, got: str) -> str:
    return f"{adapter.stored.path}: is an adapter for another base: expected {expected}, got {got}"


def _repository(text: str) -> str | None:
    """`org/name` of a hub in `hf:org/name@revision` or the like; None if it is not one."""
    found = re.fullmatch(r"(?:(?:hf|ms):)?(\w[\w.-]*/[\w.-]+)(?:@[^#]+)?(?:#.*)?", text)
    return found[1] if found else None
