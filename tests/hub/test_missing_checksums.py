"""Weights that were fetched before the store had checksums get them, once they are known to be what was fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergecli.hub.fetch import fetch
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.checksums import DamagedFileError
from tests.conftest import Run
from tests.hub.conftest import Hubs
from tests.support.kept_files import flip


def manifest(folder: Path, change: dict[str, Any] | None = None) -> dict[str, Any]:
    file = folder / ".mergecli.json"
    known = json.loads(file.read_text()) | (change or {})
    file.write_text(json.dumps(known))
    return known


def old_store(*sources: str) -> list[Path]:
    """The folders of what was fetched, as a version without checksums would have left them."""
    folders = list(fetch(sources).paths)
    for folder in folders:
        manifest(folder, {"checksums": {}})
    return folders


@pytest.mark.parametrize("how", [[], ["--verify"]])
def test_a_later_fetch_and_a_verification_add_them_and_say_what_they_compared(
    hubs: Hubs, run: Run, how: list[str]
) -> None:
    fetched = fetch("hf:org/tuned").paths[0]
    known = manifest(fetched)["checksums"]
    (folder,) = old_store("hf:org/tuned")
    ended = run("fetch", "hf:org/tuned", *how)
    assert (ended.status, ended.err) == (
        0,
        "note: `hf:org/tuned`: files of weights that came before the store had checksums have them now (1); "
        "their SHA-256 is still the one that the hub gives\n",
    )
    assert manifest(folder)["checksums"] == known
    assert run("fetch", "hf:org/tuned", *how).err == ""
    weights = folder / "model.safetensors"
    flip(weights, 8 * weights.stat().st_size - 3)
    with pytest.raises(DamagedFileError), open_checkpoint(weights) as opened:
        opened.digest()


def test_several_are_one_note(hubs: Hubs, run: Run) -> None:
    old_store("hf:org/tuned", "hf:org/base")
    assert run("fetch", "hf:org/tuned", "hf:org/base").err == (
        "note: `hf:org/tuned`, `hf:org/base`: files of weights that came before the store had checksums have them now (2); "
        "their SHA-256 is still the one that the hub gives\n"
    )


def test_where_the_hub_gives_no_sha_256_it_is_that_of_when_the_file_came(hubs: Hubs, run: Run) -> None:
    (folder,) = old_store("hf:org/tuned")
    listing = [{**each, "sha256": None} for each in manifest(folder)["listing"]]
    manifest(folder, {"listing": listing})
    assert run("fetch", "hf:org/tuned").err.endswith(
        "; their SHA-256 is still the one that was found when they came: the hub gives none\n"
    )


@pytest.mark.parametrize("how", [[], ["--verify"]])
def test_damaged_weights_get_none_and_are_refused(hubs: Hubs, run: Run, how: list[str]) -> None:
    (folder,) = old_store("hf:org/tuned")
    weights = folder / "model.safetensors"
    flip(weights, 8 * weights.stat().st_size - 3)
    ended = run("fetch", "hf:org/tuned", *how)
    assert (ended.status, ended.out) == (3, "")
    assert f"{weights}: is damaged: its SHA-256 is not " in ended.err
    assert ended.err.endswith("hint: delete what is damaged, then run `mergecli fetch hf:org/tuned`\n")
    assert manifest(folder)["checksums"] == {}


def test_a_store_that_cannot_be_written_and_a_dry_run_leave_it_as_it_is(
    hubs: Hubs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = old_store("hf:org/tuned")
    assert run("fetch", "hf:org/tuned", "--dry-run").status == 0
    assert run("fetch", "hf:org/tuned", "--offline").status == 0
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert run("fetch", "hf:org/tuned").err == ""
    assert manifest(folder)["checksums"] == {}
