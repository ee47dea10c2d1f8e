"""Data sets: which Parquet files are fetched, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecli.hub.fetch import fetch
from mergecli.hub.file_selection import data_files
from mergecli.runtime.errors import HubError
from mergecli.storage.sources import Source
from mergecli.storage.store import RemoteFile, locate
from tests.conftest import Run
from tests.hub.conftest import Hubs, parquet
from tests.hub.servers import Repository


def chosen(names: list[str], config: str | None, needed: list[str], wanted: list[str]) -> list[str]:
    files = [RemoteFile(name, 1) for name in names]
    return [file.path for file in data_files(files, config, needed, wanted, "hf:org/x")]


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (["data/test-00000-of-00001.parquet", "data/contrast-00000-of-00001.parquet"], None, [0]),
        (["test.parquet", "train.parquet", "README.md"], None, [0, 1]),
        (["a/test-0.parquet", "b/test-0.parquet"], "a", [0]),
        (["cropped_digits/train-00000-of-00001.parquet", "full_numbers/train-00000-of-00001.parquet",
          "cropped_digits/test-00000-of-00001.parquet"], "cropped_digits", [0, 2]),
        (["default/test/0000.parquet", "default/train/0000.parquet", "default/train/0001.parquet"], None, [0, 1, 2]),
        (["default/test/0000.parquet"], "not-there", [0]),
        (["data/valid-00000-of-00001.parquet", "data/test-00000-of-00001-0123456789abcdef.parquet"], None, [0, 1]),
    ],
)  # fmt: skip
def test_files_are_chosen_by_the_split_that_their_names_tell(
    names: list[str], config: str | None, expected: list[int]
) -> None:
    assert chosen(names, config, [], ["train", "test", "valid"]) == sorted(names[place] for place in expected)


def test_a_split_that_must_be_there_is_missed() -> None:
    with pytest.raises(HubError, match=r"hf:org/x: has no split `test`\nhint: it has `train`"):
        chosen(["train.parquet"], None, ["test"], ["train"])
    with pytest.raises(HubError, match="has split `test` in several folders: `a`, `b`"):
        chosen(["a/test-0.parquet", "b/test-0.parquet"], None, ["test"], [])


def test_a_task_gets_the_splits_it_uses(hubs: Hubs, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    task = '[tasks.birds]\ndata = "hf:org/birds"\ntemplates = ["{}"]\n'
    path.write_text('[tuned]\nbirds = "toy:digits"\n' + task + 'split = "extra"\ntrain_split = "none"\n')
    assert [each.path for each in fetch(path).downloads] == ["data/extra-00000-of-00001.parquet"]
    path.write_text('[tuned]\nbirds = "toy:digits"\n' + task)
    names = [each.path.partition("-")[0] for each in fetch(path).downloads]
    assert names == ["data/test", "data/train", "data/train"]


def test_built_in_tasks_get_their_configuration(hubs: Hubs, tmp_path: Path) -> None:
    hubs.hf.repositories["datasets/ufldl-stanford/svhn"] = Repository(
        parquet(*(f"{config}/{split}-00000-of-00001.parquet" for config in ("cropped_digits", "full_numbers")
                  for split in ("train", "test", "extra")))
    )  # fmt: skip
    path = tmp_path / "r.toml"
    path.write_text('[tuned]\n[eval]\ntasks = ["svhn"]\n')
    names = [each.path for each in fetch(path).downloads]
    assert names == [f"cropped_digits/{split}-00000-of-00001.parquet" for split in ("test", "train")]


def test_every_built_in_task_is_found_where_its_table_says(hubs: Hubs, tmp_path: Path) -> None:
    from mergecli.data import tasks

    for name in tasks.sets()["tall20"]:
        task = tasks.find(name)
        folder = task.config or "data"
        hubs.hf.repositories[f"datasets/{task.data.name}"] = Repository(
            parquet(f"{folder}/{task.split}-0.parquet", f"{folder}/{task.train_split}-0.parquet")
        )
    path = tmp_path / "r.toml"
    path.write_text('[tuned]\n[eval]\ntasks = ["tall20"]\n')
    done = fetch(path)
    assert (len(done.paths), len(done.downloads)) == (20, 40)


def test_extra_splits_that_a_recipe_names_come_too(hubs: Hubs, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[tuned]\n[eval]\ntasks = ["birds"]\nsplits = ["extra"]\n'
                    '[tasks.birds]\ndata = "hf:org/birds"\ntemplates = ["{}"]\n')  # fmt: skip
    assert len(fetch(path).downloads) == 4


def test_what_is_no_parquet_is_taken_from_where_the_hub_keeps_it_as_such(hubs: Hubs) -> None:
    repository = Repository({"train/0.tar": b"x", "test/0.tar": b"x"})
    converted = repository.commit(
        parquet("default/test/0000.parquet", "default/train/0000.parquet"), "refs/convert/parquet", alone=True
    )
    hubs.hf.repositories["datasets/org/tars"] = repository
    done = fetch("hf:datasets/org/tars")
    assert done.paths[0].name == converted
    assert len(done.downloads) == 2
    assert locate(Source("hf", "org/tars", is_data=True)) == done.paths[0]
    hubs.forget()
    assert fetch("hf:datasets/org/tars").paths == done.paths
    assert len(hubs.asked) == 1
    repository.commit({"test/1.tar": b"y"})
    assert fetch("hf:datasets/org/tars").paths == done.paths


def test_a_data_set_that_is_a_script_is_refused_with_the_reason(hubs: Hubs, run: Run) -> None:
    hubs.hf.repositories["datasets/org/script"] = Repository({"script.py": b"import os", "README.md": b""})
    ended = run("fetch", "hf:datasets/org/script")
    assert ended.status == 4
    assert (
        "has no Parquet files: its images come out of a script (`script.py`), which would have to be run"
        in ended.err
    )
    assert "hint: name a data set that has them" in ended.err
    assert not list(hubs.store.rglob("*.py"))


def test_a_model_is_no_data_set(hubs: Hubs) -> None:
    with pytest.raises(HubError, match="data sets are written `hf:datasets/org/name`"):
        fetch("hf:org/birds")
    assert (fetch("hf:datasets/org/birds").paths[0]).parent == hubs.store / "hf/datasets/org/birds"


def test_a_pickle_on_this_machine_is_converted_into_the_store(tmp_path: Path, run: Run) -> None:
    weights = {"a": torch.randn(3, 4), "steps": torch.arange(3)}
    torch.save({"state_dict": weights}, tmp_path / "old.pt")
    refused = run("fetch", "old.pt", MERGECLI_HOME="store")
    assert (refused.status, refused.out) == (2, "")
    assert "--allow-pickle" in refused.err
    done = run("fetch", "--allow-pickle", "old.pt", MERGECLI_HOME="store")
    assert (done.status, done.err) == (0, "")
    converted = Path(done.out.strip())
    assert {name: each.tolist() for name, each in load_file(tmp_path / converted).items()} == {
        name: each.tolist() for name, each in weights.items()
    }
    assert run("fetch", "--allow-pickle", "old.pt", MERGECLI_HOME="store").out == done.out
    assert run("info", str(converted)).status == 0


def test_a_folder_with_a_pickle_is_converted_with_its_configuration(tmp_path: Path, run: Run) -> None:
    (tmp_path / "model").mkdir()
    torch.save({"a": torch.randn(2)}, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "config.json").write_text("{}")
    done = run("fetch", "--allow-pickle", "model", MERGECLI_HOME="store")
    assert (done.status, done.err) == (0, "")
    folder = tmp_path / done.out.strip()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert run("fetch", "--allow-pickle", "model", MERGECLI_HOME="store").out == done.out
