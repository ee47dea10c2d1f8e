"""Health of the store and the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergecli.storage.cache import cache_path
from mergecli.storage.health import cache_health, store_health
from mergecli.storage.safetensors_writer import save_tensors
from mergecli.storage.store import MANIFEST

CONTENT = b"a model"


def commit(folder: Path, *names: str, content: bytes = CONTENT) -> Path:
    """A fetched commit with files of that content."""
    import hashlib

    folder.mkdir(parents=True)
    digest = hashlib.sha256(content).hexdigest()
    for name in names:
        (folder / name).write_bytes(content)
    files = {name: {"size": len(content), "sha256": digest, "made_from": None} for name in names}
    (folder / MANIFEST).write_text(json.dumps({"listing": None, "converted_from": None, "files": files}))
    return folder


def test_models_and_data_sets_are_counted_and_compared(tmp_path: Path) -> None:
    commit(tmp_path / "hf/org/model/abc", "a.bin", "b.bin")
    commit(tmp_path / "ms/datasets/org/birds/def", "test.parquet")
    (tmp_path / "hf/org/other/abc.partial").mkdir(parents=True)
    found = store_health(tmp_path)
    assert found.kinds == {"models": (1, 14), "data_sets": (1, 7)}
    assert (found.files, found.checked, found.unfinished, found.damaged) == (3, 3, 1, ())


def test_what_is_missing_cut_off_changed_or_unreadable_is_named(tmp_path: Path) -> None:
    folder = commit(tmp_path / "hf/org/model/abc", "changed", "cut", "gone", "whole")
    (folder / "changed").write_bytes(b"A MODEL")
    (folder / "cut").write_bytes(b"a")
    (folder / "gone").unlink()
    other = commit(tmp_path / "hf/org/other/abc")
    (other / MANIFEST).write_text("{")
    assert store_health(tmp_path).damaged == (
        f"{folder}/cut: has 1 bytes, expected 7",
        f"{folder}/gone: is missing",
        f"{other}/{MANIFEST}: cannot be read",
        f"{folder}/changed: has another SHA-256",
    )


def test_only_a_sample_is_compared(tmp_path: Path) -> None:
    commit(tmp_path / "hf/org/model/abc", *"abcdef")
    found = store_health(tmp_path, sample=20)
    assert (found.files, found.checked) == (6, 2)
    assert store_health(tmp_path, sample=1).checked == 1  # a file that is larger than the sample


@pytest.mark.usefixtures("own_store")
def test_files_of_the_cache_are_compared_with_their_own_checksums(tmp_path: Path) -> None:
    for key in ("x:one", "x:two"):
        save_tensors({"t": torch.arange(8.0)}, cache_path("heads", key), {"what": key}, checked=True)
    whole = cache_health(tmp_path)
    assert (whole.kinds["heads"][0], whole.checked, whole.damaged) == (2, 2, ())
    path = cache_path("heads", "x:one")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache_health(tmp_path).damaged == (f"{path}: is damaged",)
    path.write_bytes(b"none")
    (damaged,) = cache_health(tmp_path).damaged
    assert damaged.startswith(f"{path}: ")


@pytest.mark.usefixtures("own_store")
def test_an_empty_place_is_well(tmp_path: Path) -> None:
    assert store_health(tmp_path / "none").damaged == cache_health(tmp_path / "none").damaged == ()
