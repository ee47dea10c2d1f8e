"""Shards of a split: one that is missing or of other data is refused, naming the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergecli.data.images import load_images
from mergecli.data.splits import check_shards
from mergecli.runtime.errors import InputError
from tests.data.test_images import png, task
from tests.support.tiny_clip import tinted


@pytest.mark.parametrize(
    "names",
    [
        ["test-00000-of-00002", "test-00001-of-00002"],
        ["test-00001-of-00002", "test-00002-of-00002"],
        ["test-00000-of-00001-0123456789abcdef"],
        ["test-0", "test-1"],
        ["test"],
        ["test_0-of-2", "test_1-of-2"],
    ],
)
def test_whole_sets_are_taken(names: list[str]) -> None:
    check_shards([Path(f"{name}.parquet") for name in names], "data")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test-00000-of-00003"], "has 1 of 3 shards; `-00001-of-00003`, `-00002-of-00003` are missing"),
        (["test-00001-of-00003", "test-00002-of-00003"], "has 2 of 3 shards; `-00000-of-00003` is missing"),
        (
            ["test-00000-of-00002", "test-00001-of-00002", "test-00000-of-00001"],
            "its shards are of 2 totals: `test-00000-of-00001.parquet`, `test-00000-of-00002.parquet`",
        ),
        (
            ["test-00000-of-00001", "test-00000-of-00001-0123456789abcdef"],
            "shard 0 is there twice: `test-00000-of-00001.parquet`, `test-00000-of-00001-0123456789abcdef.parquet`",
        ),
        (
            ["test-00000-of-00001", "test"],
            "has `test-00000-of-00001.parquet`, and beside these shards `test.parquet`",
        ),
    ],
)
def test_other_sets_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^data: {re.escape(message)}(\n|$)"):
        check_shards([Path(f"{name}.parquet") for name in names], "data")


def write(path: Path, image: object, label: object, names: list[str] | None = None, **more: object) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": [image], "label": label, **more})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)


@pytest.mark.parametrize("kind", ["type", "column", "order", "names"])
def test_shards_that_differ_are_refused_naming_files_and_column(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    image = png(tinted(0, (1,)), tmp_path / "a.png")["bytes"]
    one, two = (tmp_path / f"test-0000{number}-of-00002.parquet" for number in (0, 1))
    label = pa.array([0], pa.int64())
    write(one, image, label, None if kind in ("type", "column") else ["robin", "wren"])
    changed = {
        "type": {"label": pa.array([0], pa.int32())},
        "column": {"more": [1]},
        "order": {"names": ["wren", "robin"]},
        "names": {"names": None},
    }[kind]
    write(two, image, **{"label": label, **changed})  # type: ignore[arg-type]
    message = {
        "type": "differ in column `label`: int64 and int32",
        "column": "differ in column `more`: missing and int64",
        "order": "differ in the class names of column `label`: `robin`, `wren` and `wren`, `robin`",
        "names": "differ in the class names of column `label`: `robin`, `wren` and `none`",
    }[kind]
    with pytest.raises(InputError, match=re.escape(f"{one.name} and {two.name} {message}")):
        load_images(task(tmp_path, classes=("robin", "wren")))


def test_splits_whose_names_stand_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    image = png(tinted(0, (1,)), tmp_path / "a.png")["bytes"]
    write(tmp_path / "train.parquet", image, [0], ["robin", "wren"])
    write(tmp_path / "test.parquet", image, [0], ["wren", "robin"])
    known = task(tmp_path, classes=("Robin", "Wren"))
    assert (load_images(known, "train").labels, load_images(known).labels) == ([0], [1])
