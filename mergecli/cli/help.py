"""How help looks: options in panels, and examples that can be pasted, whatever the width."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

PROGRAM = "mergecli "
"""Paragraphs of a docstring that begin so are examples."""
OPTIONS = "Options"
COMMON = "Everywhere"
_EVERYWHERE = {"--quiet", "--verbose", "--debug", "--help"}
"""The options of that panel, which every command has."""
_UNITS = {
    "Several processes and machines": "--engine --jobs --gpus --address --gpus-per-unit --cpus-per-unit --retries --part --collect --keep-going",
}
"""The panel of commands whose work is cut into units."""
PANELS: dict[str, dict[str, str]] = {
    "merge": {
        "What is merged": "--recipe --base --method --set --sweep",
        "Going on from a merge": "--onto --replace --without",
        "Output": "--output --dtype --as-adapter --rank --shard-size --card --json --dry-run",
        "Methods that look at images": "--statistics --coefficients --save-coefficients --trace --plot --tensorboard",
        "Computing": "--device",
    },
    "eval": {
        "What is evaluated": "--recipe --set --clip --task --model --individual --ensemble --ensemble-weight",
        "Images": "--split --limit --corruption --severity",
        "Output": "--output --format --json --predictions --features --routes --dry-run",
        "Thresholds": "--min-average --min",
        "Computing": "--device --precision --batch-size --routing --workers --cache --cache-size --fresh",
        "Sweeps": "--sweep --method --select --keep --plot",
        **_UNITS,
    },
    "search": {
        "What is searched": "--recipe --set --method --space --trials --sampler --objective --seed --prune",
        "Images": "--task --split --limit",
        "Output": "--output --storage --study --format --json --dry-run",
        "Computing": "--device --precision --batch-size --workers --cache --cache-size",
        **_UNITS,
    },
    "continual": {
        "What is merged": "--recipe --method --set",
        "Images": "--split --limit",
        "Output": "--output --keep --format --json --dry-run",
        "Computing": "--device --precision --batch-size --workers --cache --cache-size --fresh",
        **_UNITS,
    },
    "measure": {
        "What is measured": "--recipe --method --set --task",
        "Output": "--output",
        "Computing": "--device",
        **_UNITS,
    },
    "finetune": {
        "What is trained": "--recipe --set --base --task --each --lora --l-lora",
        "Training": "--steps --learning-rate --batch-size --accumulate --weight-decay --schedule --warmup --epsilon --seed",
        "Adapters": "--rank --alpha --target-modules --lora-dropout",
        "Validation": "--validate-every --validation-split",
        "Output": "--output --dtype --trace --tensorboard --json --dry-run",
        "Computing": "--device --precision --save-every --fresh",
        **_UNITS,
    },
    "report": {
        "Rows and columns": "--sort --ascending --metric --seen --normalized --fine-tuned --transpose",
        "Comparisons": "--intervals --against --predictions --p-values --reference --reference-rows",
        "Output": "--format --json --output --card --plot --plot-kind",
        "Chains of merges": "--continual --steps",
    },
}  # fmt: skip
"""Command with many options -> panel -> its options, in order; all others are in the panel `Options`."""

_METAVARS = {"path": "PATH", "int": "N", "int range": "N", "float": "X", "float range": "X"}


def metavar(parameter: Any) -> str | None:
    """What stands for the value of an option, in capitals: its name, where nothing says more; None for a flag."""
    if parameter.is_flag:
        return None
    name = max(parameter.opts, key=len).strip("-").upper()
    return parameter.metavar or _METAVARS.get(parameter.type.name, name)


def prose(text: str | None) -> str:
    """A docstring without its examples."""
    return "\n\n".join(each for each in _paragraphs(text) if not each.startswith(PROGRAM))


def examples(text: str | None, width: int) -> Iterator[str]:
    """The examples of a docstring in lines of at most `width`, which a shell reads as one."""
    for each in _paragraphs(text):
        if each.startswith(PROGRAM):
            yield from _wrapped(" ".join(each.split()), width)


def _paragraphs(text: str | None) -> list[str]:
    return inspect.cleandoc(text or "").split("\n\n")


def _wrapped(command: str, width: int) -> Iterator[str]:
    """A command in lines that end with a backslash; an option and its value stay together."""
    parts: list[str] = []
    for word in command.split():
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    line = parts[0]
    for part in parts[1:]:
        if len(line) + len(part) + 3 > width:
            yield f"{line} \\"
            line = f"    {part}"
        else:
            line += f" {part}"
    yield line


def panels(command: str, parameters: Sequence[Any], context: Any) -> dict[str, list[tuple[str, str]]]:
    """Panel -> its options, each with its help; arguments come first, what is common to all commands last."""
    names = {name: panel for panel, text in PANELS.get(command, {}).items() for name in text.split()}
    order = list(names)
    found: dict[str, list[tuple[int, tuple[str, str]]]] = {
        name: [] for name in ("Arguments", *PANELS.get(command, {}), OPTIONS, COMMON)
    }
    for each in parameters:
        record = each.get_help_record(context)
        if record is None:
            continue
        if each.param_type_name == "argument":
            found["Arguments"].append((0, record))
            continue
        name = max(each.opts, key=len)
        panel = COMMON if name in _EVERYWHERE else names.get(name, OPTIONS)
        found[panel].append((order.index(name) if name in names else 0, record))
    return {panel: [record for _, record in sorted(rows, key=itemgetter(0))] for panel, rows in found.items()}
