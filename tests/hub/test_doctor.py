"""What `doctor` finds, and what it does not tell."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

import mergecli
from mergecli.hub.fetch import fetch
from tests.conftest import Run
from tests.hub.conftest import Hubs


def test_it_tells_versions_devices_sizes_and_health(hubs: Hubs, run: Run) -> None:
    fetch(["hf:org/tuned", "hf:datasets/org/birds"])
    hubs.forget()
    ended = run("doctor", "--json")
    assert (ended.status, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["machine"]["devices"][0] == "cpu"
    assert found["store"]["models"]["commits"] == found["store"]["data_sets"]["commits"] == 1
    assert found["store"]["sample"] == {"files": 7, "compared": 7, "damaged": 0}
    assert (found["hubs"], found["damaged"], found["problems"]) == ({}, [], [])
    assert hubs.asked == []


def test_a_damaged_file_is_named_in_the_paste_and_is_status_3(hubs: Hubs, run: Run) -> None:
    (folder,) = fetch("hf:org/tuned").paths
    file = folder / "vocab.json"
    file.write_bytes(b"[]\n")
    ended = run("doctor")
    assert ended.status == 3
    assert f" {file}   has another SHA-256" in ended.out
    assert ended.err == (
        "error: 1 thing is not as it should be\n"
        "hint: `mergecli cache KIND --clear` removes what can be made again; a damaged fetched folder is deleted, and "
        "fetched again\n"
    )
    assert json.loads(run("doctor", "--json").out)["damaged"] == [f"{file}: has another SHA-256"]


def test_a_cache_in_which_nothing_can_be_kept_is_a_problem_and_a_new_one_is_none(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    for variable, folder, what in (
        ("MERGECLI_HOME", file, "is a file, a folder was expected"),
        ("MERGECLI_HOME", file / "in", "cannot write: not a directory"),
        ("MERGECLI_CACHE", file, "is a file, a folder was expected"),
    ):
        ended = run("doctor", "--json", **{variable: str(folder)})
        assert ended.status == 3
        (problem,) = json.loads(ended.out)["problems"]
        assert problem in (f"{folder}: {what}", f"{folder}/cache: {what}")
    assert run("doctor", "--json", MERGECLI_HOME=str(tmp_path / "with spaces" / "ünïcode")).status == 0
    assert [each.name for each in tmp_path.iterdir()] == ["a file"]


def test_hubs_are_asked_only_on_demand_and_any_answer_is_one(hubs: Hubs, run: Run) -> None:
    ended = run("doctor", "--online", "--json")
    assert (ended.status, ended.err) == (0, "")
    found = json.loads(ended.out)["hubs"]
    assert [*found] == ["Hugging Face", "ModelScope"]
    assert found["Hugging Face"]["host"] == hubs.hf.endpoint.removeprefix("http://")
    assert all(each["seconds"] >= 0 and each["why"] is None for each in found.values())


def test_a_hub_that_cannot_be_reached_is_status_4(hubs: Hubs, run: Run) -> None:
    ended = run("doctor", "--online", HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.status == 4
    assert " Hugging Face   127.0.0.1:9, connection refused" in ended.out
    assert ended.err.startswith("error: Hugging Face cannot be reached\nhint: check the network")


def test_no_token_no_value_of_a_variable_and_no_user_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path / "home" / "alice"
    user.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("LOGNAME", "alice")
    ended = run(
        "doctor",
        MERGECLI_HOME=user / "store",
        HF_TOKEN="hf_secret",
        HTTPS_PROXY="http://alice:secret@proxy.example:1",
    )
    assert ended.status == 0
    assert " folder       ~/store" in ended.out
    assert "HF_TOKEN, HTTPS_PROXY" in ended.out
    ended = run("doctor", MERGECLI_HOME=tmp_path / "data" / "alice" / "store", HF_TOKEN="hf_secret")
    assert f" folder       {tmp_path}/data/USER/store" in ended.out
    for text in ("alice", "secret", "proxy.example"):
        assert text not in ended.out + ended.err


def test_a_library_that_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def found(name: str) -> str:
        if name in ("peft", "matplotlib"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", found)
    examined = mergecli.doctor()
    assert examined.problems == (
        "peft is not installed; mergecli needs peft>=0.17",
        "torch is 1.0; mergecli needs torch>=2.4",
    )
    assert examined.versions["matplotlib"] is None


def test_all_that_users_can_add_is_told_and_what_developers_need_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = [
        "torch>=2.4",
        "no-such>=1; extra == 'search'",
        "pytest>=99; extra == 'dev'",
        "numpy>=99; extra == 'ray'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needed)
    examined = mergecli.doctor()
    assert examined.versions.keys() == {"mergecli", "python", "torch", "no-such", "numpy"}
    assert examined.versions["no-such"] is None
    assert examined.problems == (f"numpy is {importlib.metadata.version('numpy')}; mergecli needs numpy>=99",)


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_bug(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = run("doctor")
    assert ended.status == 3
    assert "torch cannot be used   import of torch halted" in ended.out
    assert " devices      none" in ended.out
