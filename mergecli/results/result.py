"""The result of an evaluation, as a value and as the JSON file `mergecli.eval/1`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.data.pools import pool_of
from mergecli.results.frames import frame
from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.storage.atomic import whole_file
from mergecli.storage.table_reader import TableReader

if TYPE_CHECKING:
    from pandas import DataFrame

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
    task_found: float | None = None
    """Of a file that finds the task of an image by itself, the share of the images whose task it found. Their classes are those of
    the true task all the same. None for other files, and for tasks that the file does not know."""


@dataclass(frozen=True)
class Average:
    """Means over the tasks, each counting the same."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """The result of one tower on several tasks."""

    checkpoint: Mapping[str, str | None]
    """`name`, `path` (no folders; of an ensemble its name), `digest`, `kind`, `method` and its settings, `method.density` for one; None where the
    file does not say. `ensemble` is how an ensemble is made of its `models`. `heads` is `learned` where the file's own take the place of zero-shot heads. `quantized` says of which
    quantized task vectors it was made, and what those lost. Of the best point of a sweep `selected_on`: the split that it was chosen on."""
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
    """Of a merge, model -> source as in its recipe, without folders; empty if the file does not record it. Of an ensemble, its members."""
    recipe_pool: str | None = None
    """The pool of the models as the recipe says it; None where it does not."""
    looked_at: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    """Of a data-driven method, task -> `split` and `data`, the fingerprint of the images."""

    @property
    def name(self) -> str:
        """The name of the checkpoint in tables."""
        return self.checkpoint["name"] or ""

    @property
    def pool(self) -> str | None:
        """The pool of its models: as the recipe says it, else by where they come from; None if it is not known."""
        return self.recipe_pool or pool_of(self.models.values() or [self.checkpoint.get("path") or ""])

    @property
    def is_ensemble(self) -> bool:
        """Whether it is of several towers together, and not of one."""
        return self.checkpoint.get("ensemble") is not None

    @property
    def average(self) -> Average:
        """Means over the tasks."""
        scores = self.tasks.values()
        return Average(
            accuracy=sum(score.accuracy for score in scores) / len(self.tasks),
            loss=sum(score.loss for score in scores) / len(self.tasks),
        )

    def to_frame(self) -> DataFrame:
        """A row a task, as a pandas DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        return Evaluations([self]).to_frame()

    def to_json(self) -> str:
        """The text of the result file."""
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "checkpoint": dict(self.checkpoint),
            "clip": dict(self.clip),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            **({"device": self.device} if self.device else {}),
            **({"pool": self.recipe_pool} if self.recipe_pool else {}),
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


class Evaluations(tuple[Evaluation, ...]):
    """Results in order: a tuple that pandas can have."""

    def to_frame(self) -> DataFrame:
        """A row a result and task, as a pandas DataFrame: `model`, `method`, `task`, and what is known of its score.

        Raises:
            UsageError: pandas is not installed.
        """
        rows = [
            (each.name, each.checkpoint.get("method"), task, *(getattr(score, key) for key in _IN_FRAMES))
            for each in self
            for task, score in each.tasks.items()
        ]
        return frame(rows, ("model", "method", "task", *_IN_FRAMES))


_IN_FRAMES = ("accuracy", "loss", "correct", "images", "split", "limit", "corruption", "severity")


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
    except IsADirectoryError as error:
        raise InputError(
            f"{file}: is a folder, a result was expected", f"name its files: {file}/*.json"
        ) from error
    except OSError as error:
        raise InputError(f"{file}: cannot read: {(error.strerror or '').lower()}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON", _HINT) from error
    read = TableReader(at_once=True)
    try:
        result = _result(read.table(values, "the file"), read)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{file}: is not a result: {error}", _HINT) from error
    if not result.tasks or not result.checkpoint.get("name"):
        raise InputError(f"{file}: names no {'checkpoint' if result.tasks else 'tasks'}", _HINT)
    return result


def _result(values: Mapping[str, Any], read: TableReader) -> Evaluation:
    if values.get("schema") != SCHEMA:
        read.expected("schema", f"`{SCHEMA}`", values.get("schema"))
    info = read.table(values.get("model_info"), "model_info")
    looked_at = read.table(values.get("looked_at", {}), "looked_at")
    return Evaluation(
        checkpoint=_strings(values.get("checkpoint"), "checkpoint", read),
        clip=_strings(values.get("clip"), "clip", read),
        parameters=read.whole(info.get("all_params"), "model_info.all_params"),
        tasks={
            name: _score(name, score, read)
            for name, score in read.table(values.get("tasks"), "tasks").items()
        },
        batch_size=read.whole(values.get("batch_size"), "batch_size"),
        dtype=read.text(values.get("dtype"), "dtype"),
        device=read.text(values["device"], "device") if "device" in values else None,
        recipe_pool=read.text(values["pool"], "pool") if "pool" in values else None,
        models=_strings(values.get("models", {}), "models", read),
        looked_at={task: _strings(each, f"looked_at.{task}", read) for task, each in looked_at.items()},
        bytes=read.whole(info["bytes"], "model_info.bytes") if "bytes" in info else None,
        relative_size=read.number(info["relative_size"], "model_info.relative_size")
        if "relative_size" in info
        else None,
    )


_HINT = "expected a file that `mergecli eval -o` wrote"
_SIZES = {"bytes": "int", "relative_size": "float"}


def _table(score: TaskScore) -> dict[str, Any]:
    """One task's part of the file; what is None is left out."""
    return {name: value for name, value in asdict(score).items() if value is not None}


def _score(task: str, values: Any, read: TableReader) -> TaskScore:
    """One task's part of the file."""
    kinds = {"int": read.whole, "float": read.number, "str": read.text}
    table = read.table(values, f"tasks.{task}")
    given: dict[str, Any] = {}
    for part in fields(TaskScore):
        key, value = f"tasks.{task}.{part.name}", table.get(part.name)
        kind, _, optional = str(part.type).partition(" | ")
        if part.name in table or not optional:
            given[part.name] = _strings(value, key, read) if part.name == "data" else kinds[kind](value, key)
    score = TaskScore(**given)
    if (
        score.images < 1
        or not 0 <= score.correct <= score.images
        or score.accuracy != score.correct / score.images
    ):
        read.wrong(f"tasks.{task}", "`accuracy`, `correct` and `images` do not agree")
    return score


def _strings(value: Any, key: str, read: TableReader) -> dict[str, Any]:
    table = read.table(value, key)
    if not all(isinstance(each, str | None) for each in table.values()):
        read.expected(key, "a table of strings", value)
    "".join(each or "" for each in table.values()).encode()  # raises ValueError if it is no text
    return table


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
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(
            f"{target}: two results would be called {quoted(sorted(twice))}",
            "write `NAME=SOURCE`, each with a name of its own",
        )
    return [target / f"{name}.json" for name in names]


def write_predictions(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Writes a row for each image, as Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    with whole_file(path) as file:
        parquet.write_table(pa.table(dict(columns)), file)
