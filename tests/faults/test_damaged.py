"""Files that are not what they should be: each with its message, and nothing written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint
from tests.conftest import Run, World


def header(tensors: object, data: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


X = {"x": entry("F32", [2], 0, 8)}

DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (
        lambda: b"",
        "is empty, a safetensors file was expected\nhint: the copy or download did not finish",
    ),
    "text": (lambda: b"hello, this is no checkpoint at all", "is not a safetensors file"),
    "huge header": (lambda: (1 << 60).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
    "cut in the header": (
        lambda: header(X, bytes(8))[:30],
        r"is cut short: its header takes \d+ bytes, the file has 30",
    ),
    "last four bytes missing": (
        lambda: header(X, bytes(8))[:-4],
        r"is cut short: 4 of \d+ bytes are missing",
    ),
    "bytes at the end": (lambda: header(X, bytes(11)), "is damaged: 3 bytes after the last tensor"),
    "overlap": (
        lambda: header({**X, "y": entry("F32", [2], 4, 12)}, bytes(12)),
        "is damaged: `y` does not begin where the tensor before it ends",
    ),
    "hole": (
        lambda: header({**X, "y": entry("F32", [1], 12, 16)}, bytes(16)),
        "is damaged: `y` does not begin where the tensor before it ends",
    ),
    "size and shape": (
        lambda: header({"x": entry("F32", [3], 0, 8)}, bytes(8)),
        r"is damaged: the size of `x` does not fit its shape \(3,\)",
    ),
    "negative shape": (lambda: header({"x": entry("F32", [-2], 0, 8)}, bytes(8)), "is damaged: `x`"),
    "unknown dtype": (
        lambda: header({"x": entry("F31", [2], 0, 8)}, bytes(8)),
        "`x` has dtype F31, which mergecli does",
    ),
    "no JSON": (lambda: header(b'{"x": ', bytes(8)), "is not a safetensors file: its header cannot be read"),
    "wrong JSON": (
        lambda: header({"x": 3}, bytes(8)),
        "is not a safetensors file: its header cannot be read",
    ),
    "a list": (
        lambda: header(b'{"x": [1]}', bytes(8)),
        "is not a safetensors file: its header cannot be read",
    ),
    "pickle": (lambda: pickle.dumps({"x": [1.0]}), "is a pickle, which is not opened as it is"),
    "git lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer, not the weights",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = DAMAGED[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(make())
    with pytest.raises(InputError, match=rf"x.safetensors: {message}"):
        open_checkpoint(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "boom",))  # type: ignore[return-value]

    torch.save({"x": Boom()}, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match="is a pickle, which is not opened as it is\nhint: a pickle may run any code"
    ):
        open_checkpoint(tmp_path / "x.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.pt").rename(tmp_path / "folder" / "pytorch_model.bin")
    with pytest.raises(
        InputError, match="folder: has only pickled weights, and a pickle is not opened as it is"
    ):
        open_checkpoint(tmp_path / "folder")
    assert not (tmp_path / "boom").exists()


def test_a_file_that_shrinks_while_it_is_read_is_noticed(world: World) -> None:
    with open_checkpoint(world.base_file) as checkpoint:
        data = world.base_file.read_bytes()
        world.base_file.write_bytes(data[:-100])
        with pytest.raises(InputError, match=r"base.safetensors: was cut short while it was being read"):
            checkpoint.digest()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "has no `model.safetensors`"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter, not a checkpoint"),
        (
            lambda folder: [(folder / n).touch() for n in ("a.safetensors", "b.safetensors")],
            "has 2 safetensors files",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "is not an index of shards",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "no.safetensors"}}'
            ),
            r"shards are missing:\n  no.safetensors",
        ),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_lacks(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_the_program_says_the_same_with_status_3_and_leaves_nothing(world: World, run: Run) -> None:
    file = world.files["t2"]
    file.write_bytes(file.read_bytes()[:-4])
    before = sorted(world.folder.iterdir())
    ended = run(
        "merge",
        "--base",
        "base.safetensors",
        "t1.safetensors",
        "t2.safetensors",
        "--method",
        "ties",
        "-o",
        "m.safetensors",
    )
    assert (ended.status, ended.out) == (3, "")
    assert ended.err.startswith("error: t2.safetensors: is cut short: 4 of ")
    assert ended.err.endswith("hint: the copy or download did not finish: fetch it again\n")
    assert sorted(world.folder.iterdir()) == before


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickles_first_bytes_is_read(tmp_path: Path, length: int) -> None:
    from mergecli.formats.convert import is_pickled

    file = tmp_path / "m.safetensors"
    for filler in range(length):
        save_file({"w": torch.ones(2)}, file, metadata={"note": "x" * filler})
        if int.from_bytes(file.read_bytes()[:8], "little") == length:
            break
    assert file.read_bytes()[:1] == b"\x80"
    assert open_checkpoint(file).entries["w"].shape == (2,)
    assert not is_pickled(file)
