"""What stands where a file of tensors should be: folders, pipes, devices, shards elsewhere, headers that say things twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Run

READ_AT_PLACES = "hint: tensors are read from many places of a file: copy them to a file, and name that\n"


@pytest.mark.parametrize("name", ["model.safetensors", "only.safetensors"])
@pytest.mark.parametrize(("make", "what"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder")])
def test_weights_in_a_folder_that_are_no_file_are_refused(
    tmp_path: Path, run: Run, name: str, make: object, what: str
) -> None:
    (tmp_path / "m").mkdir()
    make(tmp_path / "m" / name)  # type: ignore[operator]
    ended = run("info", "m")
    assert ended.status == 3
    assert ended.err == f"error: m/{name}: is {what}, a file was expected\n{READ_AT_PLACES}"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_a_device_is_no_checkpoint(run: Run, device: str) -> None:
    ended = run("info", device)
    assert (ended.status, ended.err.splitlines()[0]) in [
        (3, f"error: {device}: is a device, a file was expected"),
        (3, f"error: {device}: cannot open: no such device or address"),
    ]


def test_an_index_and_a_shard_that_are_pipes_are_refused(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert run("info", "model.safetensors.index.json").err == (
        f"error: model.safetensors.index.json: is a pipe, a file was expected\n{READ_AT_PLACES}"
    )
    (tmp_path / "two.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    os.mkfifo(tmp_path / "a.safetensors")
    assert run("info", "two.safetensors.index.json").err == (
        "error: two.safetensors.index.json: shards are missing:\n  a.safetensors\n"
        "hint: copy, fetch or make the model again\n"
    )


@pytest.mark.parametrize(
    "outside", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "C:\\x"]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_reaches_no_file_outside_of_its_folder(
    tmp_path: Path, run: Run, outside: str, index: str
) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / index).write_text(json.dumps({"weight_map": {"x": outside}}))
    ended = run("merge", f"m/{index}", "--method", "average", "-o", "out.safetensors")
    assert ended.status == 3
    assert ended.err == (
        f"error: m/{index}: is not an index of shards: `weight_map` names `{outside}`, which does not lie beside the "
        "index\nhint: copy, fetch or make the model again\n"
    )


def test_an_index_reads_shards_of_a_folder_below_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "parts").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "parts" / "1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "parts/1.safetensors"}}')
    assert run("info", "model.safetensors.index.json").status == 0


TENSOR = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("{" + TENSOR + "," + TENSOR + "}", "x"),
        ('{"x":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "dtype"),
        ('{"__metadata__":{"kind":"checkpoint","kind":"task vector"},' + TENSOR + "}", "kind"),
        ('{"__metadata__":{},"__metadata__":{"kind":"task vector"},' + TENSOR + "}", "__metadata__"),
    ],
)
def test_a_header_that_says_something_twice_is_refused(
    tmp_path: Path, run: Run, header: str, key: str
) -> None:
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    ended = run("info", "m.safetensors")
    assert (ended.status, ended.err) == (
        3,
        f"error: m.safetensors: is damaged: `{key}` stands twice in its header\nhint: write the file again\n",
    )
