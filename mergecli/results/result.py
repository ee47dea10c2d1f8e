"""The result of an evaluation, as a value and as the JSON file `mergecli.eval/1`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.storage.atomic import whole_file

SCHEMA = "mergecli.eval/1"
FINE_TUNED = "fine-tuned"
"""The name of the result in which each model was evaluated on its own task."""


@dataclass(frozen=True)
class TaskScore:
    """The result of one tower on one task."""

    accuracy: float
    """correct / images."""
    loss: float
    """Mean cross-entropy over the images."""
    loss_batch_mean: float
    """Mean over batches of each batch's mean, in which a short last batch weighs too much; FusionBench's loss."""
    correct: int
    images: int
    split: str
    data: Mapping[str, str]
    """`source` as the recipe has it, without the folders of a path; `fingerprint` of the content."""
    classes: str
    """Digest of the class names."""
    templates: str
    """Digest of the prompts."""
    limit: int | None = None
    """The `--limit`, if it was below the size of the split; None if all images were evaluated."""
    corruption: str | None = None
    """The corruption of the images."""
    severity: int | None = None
    """Of the corruption, from 1 to 5."""


@dataclass(frozen=True)
class Average:
    """Means over the tasks, each counting the same."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """The result of one tower on several tasks."""

    checkpoint: Mapping[str, str | None]
    """`name`, `path` (no folders), `digest`, `kind`, `method` and its settings, `method.density` for one; None where the
    file does not say. Of the best point of a sweep `selected_on`: the split that it was chosen on."""
    clip: Mapping[str, str | None]
    """`path` of the CLIP whose other parts were used, and digests: `digest` of its vision tower, `text` of all that heads
    depend on, `rest` of projection and logit scale, `processing` of the image processor's settings."""
    parameters: int
    tasks: Mapping[str, TaskScore]
    """In the order in which they were asked for."""
    batch_size: int
    dtype: str
    bytes: int | None = None
    """Of the checkpoint's tensors; of models each on its own task, of all together. None in files that do not record it."""
    relative_size: float | None = None
    """`bytes` divided by those of the CLIP's own vision tower as it is stored."""
    device: str | None = None
    """The device, such as `cpu`; others round differently. None in files that do not record it."""
    models: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of a merge, model -> source as in its recipe, without folders; empty if the file does not record it."""
    looked_at: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    """Of a data-driven method, task -> `split` and `data`, the fingerprint of the images."""

    @property
    def name(self) -> str:
        """The name of the checkpoint in tables."""
        return self.checkpoint["name"] or ""

    @property
    def average(self) -> Average:
        """Means over the tasks."""
        scores = self.tasks.values()
        return Average(
            accuracy=sum(score.accuracy for score in scores) / len(self.tasks),
            loss=sum(score.loss for score in scores) / len(self.tasks),
        )

    def to_json(self) -> str:
        """The text of the result file."""
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "checkpoint": dict(self.checkpoint),
            "clip": dict(self.clip),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            **({"device": self.device} if self.device else {}),
            **({"models": dict(self.models)} if self.models else {}),
            **({"looked_at": dict(self.looked_at)} if self.looked_at else {}),
            "model_info": {
                "trainable_params": self.parameters,
                "all_params": self.parameters,
                "trainable_percentage": 1.0,
                **{key: value for key in _SIZES if (value := getattr(self, key)) is not None},
            },
            "tasks": {name: _table(score) for name, score in self.tasks.items()},
            "average": asdict(self.average),
        }
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_result(path: str | Path) -> Evaluation:
    """The result in a file that `evaluate` wrote.

    Raises:
        InputError: there is no such file, or it is anything else.
    """
    file = Path(path)
    try:
        values: Any = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such result") from error
    except OSError as error:
        raise InputError(f"{file}: cannot read: {(error.strerror or '').lower()}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON", _HINT) from error
    schema: object = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{file}: `schema`: expected `{SCHEMA}`, got {schema!r}", _HINT)
    for part in ("checkpoint", "clip", "model_info", "tasks", "models", "looked_at"):
        if part in values and not isinstance(values[part], dict):
            raise InputError(f"{file}: `{part}`: expected a table", _HINT)
    if not all(isinstance(score, dict) for score in values.get("tasks", {}).values()):
        raise InputError(f"{file}: `tasks`: expected a table for each task", _HINT)
    try:
        result = Evaluation(
            checkpoint=_strings(values["checkpoint"], "checkpoint"),
            clip=_strings(values["clip"], "clip"),
            parameters=_typed(values["model_info"]["all_params"], "int", "model_info.all_params"),
            tasks={name: _score(name, score) for name, score in values["tasks"].items()},
            batch_size=_typed(values["batch_size"], "int", "batch_size"),
            dtype=_typed(values["dtype"], "str", "dtype"),
            device=_typed(values["device"], "str", "device") if "device" in values else None,
            models=_strings(values.get("models", {}), "models"),
            looked_at={
                task: _strings(each, f"looked_at.{task}")
                for task, each in values.get("looked_at", {}).items()
            },
            **{
                key: _typed(values["model_info"][key], kind, f"model_info.{key}")
                for key, kind in _SIZES.items()
                if key in values["model_info"]
            },
        )
    except KeyError as error:
        raise InputError(f"{file}: lacks the key `{error.args[0]}`", _HINT) from error
    except TypeError as error:
        raise InputError(f"{file}: is not a result: {error}", _HINT) from error
    except (AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: is not a result", _HINT) from error
    if not result.tasks or not result.checkpoint.get("name"):
        raise InputError(f"{file}: names no {'checkpoint' if result.tasks else 'tasks'}", _HINT)
    return result


_HINT = "expected a file that `mergecli eval -o` wrote"
_SIZES = {"bytes": "int", "relative_size": "float"}
_TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def _table(score: TaskScore) -> dict[str, Any]:
    """One task's part of the file; what is None is left out."""
    return {name: value for name, value in asdict(score).items() if value is not None}


def _score(task: str, values: Any) -> TaskScore:
    """One task's part of the file."""
    given: dict[str, Any] = {}
    for part in fields(TaskScore):
        key = f"tasks.{task}.{part.name}"
        kind, _, optional = str(part.type).partition(" | ")
        if part.name not in values:
            if optional:
                continue
            raise KeyError(key)
        value = values[part.name]
        given[part.name] = _strings(value, key) if part.name == "data" else _typed(value, kind, key)
    score = TaskScore(**given)
    if (
        score.images < 1
        or not 0 <= score.correct <= score.images
        or score.accuracy != score.correct / score.images
    ):
        raise TypeError(f"`tasks.{task}`: `accuracy`, `correct` and `images` do not agree")
    return score


def _typed(value: Any, kind: str, key: str) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, _TYPES[kind])
        or (kind == "float" and not abs(value) < 1e300)
    ):
        raise TypeError(f"`{key}`: expected {kind}, got {value!r}")
    return value


def _strings(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(each, (str, type(None))) for each in value.values()):
        raise TypeError(f"`{key}`: expected a table of strings")
    "".join(each or "" for each in value.values()).encode()
    return dict(value)


def result_files(names: Sequence[str], output: str | Path | None) -> list[Path]:
    """The file of each result: a `.json` file for one, or files in a folder; none without an output.

    Raises:
        UsageError: they do not fit into the output, or two have one name.
    """
    if output is None:
        return []
    target = Path(output)
    if target.suffix == ".json":
        if len(names) > 1:
            raise UsageError(f"{target}: one file cannot hold {len(names)} results", "name a folder")
        return [target]
    if target.suffix:
        raise UsageError(f"{target}: expected a `.json` file, or a folder's name without suffix")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f"{target}: two results would be called {quoted(sorted(twice))}", "evaluate them one by one"
        )
    return [target / f"{name}.json" for name in names]


def write_predictions(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Writes a row for each image, as Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    with whole_file(path) as file:
        parquet.write_table(pa.table(dict(columns)), file)
