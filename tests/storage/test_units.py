"""The files of units, and the line about each."""

from __future__ import annotations

import json

import torch

from mergecli.runtime import notes, verbosity
from mergecli.runtime.engines.contract import Report, Unit
from mergecli.storage.safetensors_writer import save_tensors
from mergecli.storage.units import UnitFiles

UNIT = Unit(("ties", "digits"), "ab" * 16)


def report(tmp_path) -> Report:
    save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"what": "x"}, checked=True)
    return Report((tmp_path / "x.safetensors").read_bytes(), "node7", "cuda:3", 1.23456)


def read(files: UnitFiles) -> list[float] | None:
    return files.read(UNIT, lambda stored: stored.read("x").tolist())


def test_a_unit_has_its_file_under_its_key_and_a_line_in_the_log(tmp_path):
    files = UnitFiles(tmp_path / "out", 0)
    assert read(files) is None
    files.save(UNIT, report(tmp_path))
    assert read(files) == [1.0, 1.0]
    assert files.path(UNIT) == tmp_path / "out" / ".units" / f"{'ab' * 16}.safetensors"
    assert [json.loads(line) for line in (tmp_path / "out" / "units.jsonl").read_text().splitlines()] == [
        {"unit": "ties on digits", "key": "ab" * 16, "node": "node7", "device": "cuda:3", "seconds": 1.235}
    ]
    files.finish([UNIT])
    assert read(files) == [1.0, 1.0]
    files.forget([UNIT])
    assert read(UnitFiles(tmp_path / "out", 0)) is None


def test_without_a_folder_it_is_in_the_cache_until_all_is_done(tmp_path, own_store):
    files = UnitFiles(None, 10**6)
    files.save(UNIT, report(tmp_path))
    assert read(UnitFiles(None, 10**6)) == [1.0, 1.0]
    files.path(UNIT).unlink()  # the cache made room
    assert read(files) == [1.0, 1.0]
    files.save(UNIT, report(tmp_path))
    files.finish([UNIT])
    assert read(UnitFiles(None, 10**6)) is None


def test_without_a_cache_it_is_in_memory(tmp_path, own_store):
    files = UnitFiles(None, 0)
    files.save(UNIT, report(tmp_path))
    assert read(files) == [1.0, 1.0]
    assert not files.path(UNIT).exists()


def test_where_it_ran_is_said_to_those_who_want_all(tmp_path, monkeypatch):
    said: list[str] = []
    with notes.heard_by(said.append):
        UnitFiles(tmp_path, 0).save(UNIT, report(tmp_path))
        monkeypatch.setattr(verbosity, "verbose", True)
        UnitFiles(tmp_path, 0).save(UNIT, report(tmp_path))
    assert said == ["ties on digits: node7, cuda:3, 1.2 s"]
