"""What a careless or hostile world does to `fetch`, locks, old formats, sweeps and pools.

Tests marked as expected failures say what should happen and does not yet; the mark goes when it does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import mergecli
from mergecli.data.images import load_images
from mergecli.data.tasks import find
from mergecli.hub.fetch import fetch
from mergecli.recipe.lock import lock_path
from mergecli.recipe.reading import recipe_of
from mergecli.runtime.errors import HubError, InputError, UsageError
from tests.conftest import Run, random_weights
from tests.hub.conftest import RECIPE, Hubs, pickled
from tests.hub.servers import Act
from tests.hub.test_recipes import picture


def says(content: object) -> Act:
    """An answer with that JSON."""

    def act(handler: object, data: bytes) -> bool:
        handler.tell(content)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        return True

    return act


def test_a_hub_cannot_write_outside_of_the_store(hubs: Hubs, tmp_path: Path) -> None:
    listed = {
        "Path": "model.safetensors", "Type": "blob", "Size": 9, "Sha256": "a" * 64,
        "Revision": "../../../../outside", "CommittedDate": 1,
    }  # fmt: skip
    answer = {"Code": 200, "Data": {"Files": [listed]}, "Message": "", "Success": True}
    hubs.ms.misbehave("/repo/files", says(answer), times=9)
    with pytest.raises(HubError):
        fetch("ms:org/base")
    assert [path for path in tmp_path.rglob("outside*") if hubs.store not in path.parents] == []


@pytest.mark.parametrize("damage", ["removed", "replaced"])
def test_images_of_a_part_of_a_locked_split_are_no_split(hubs: Hubs, recipe: Path, damage: str) -> None:
    files = {f"data/test-0000{part}-of-00002.parquet": rows(3 + part) for part in range(2)}
    hubs.hf.repositories["datasets/org/birds"].commit(files, alone=True)
    folder = fetch(recipe).paths[-1]
    known = recipe_of(recipe)
    assert len(load_images(find("birds", known), None)) == 7
    second = folder / "data/test-00001-of-00002.parquet"
    if damage == "removed":
        second.unlink()
    else:
        second.write_bytes(rows(9))
    with pytest.raises(InputError, match="test-00001-of-00002"):
        load_images(find("birds", known), None)


def rows(count: int) -> bytes:
    """A Parquet file with that many images."""
    import io

    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    images = [{"bytes": picture(number), "path": None} for number in range(count)]
    parquet.write_table(pa.table({"image": images, "label": [number % 2 for number in range(count)]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("prefix", "variable"), [("hf", "HF_ENDPOINT"), ("ms", "MODELSCOPE_ENDPOINT")], ids=["hf", "ms"]
)
def test_the_password_of_an_endpoint_is_never_shown(hubs: Hubs, run: Run, prefix: str, variable: str) -> None:
    hub = hubs.hf if prefix == "hf" else hubs.ms
    endpoint = hub.endpoint.replace("http://", "http://me:hidden@")
    ended = run("fetch", "--dry-run", f"{prefix}:org/base", **{variable: endpoint})
    assert "hidden" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSL_CERT_FILE", "/not/there"),
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
        ("MODELSCOPE_ENDPOINT", "http://[::1"),
    ],
)
def test_a_wrong_variable_is_no_bug_of_ours(hubs: Hubs, run: Run, variable: str, value: str) -> None:
    ended = run("fetch", "ms:org/base" if "MODELSCOPE" in variable else "hf:org/base", **{variable: value})
    assert ended.status in (2, 4)
    assert variable in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("answer", ["size", "retry"])
def test_an_answer_that_makes_no_sense_is_the_hubs_fault(hubs: Hubs, answer: str) -> None:
    def too_busy(handler: object, data: bytes) -> bool:
        handler.answer(429, b"", {"Retry-After": "\u00b2"})  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        return True

    entry = {"type": "file", "path": "model.safetensors", "size": float("inf"), "oid": "0"}
    if answer == "size":
        hubs.hf.misbehave("/tree/", says([entry]), times=9)
    else:
        hubs.hf.misbehave("/revision/", too_busy, times=9)
    with pytest.raises(HubError):
        fetch("hf:org/base")


@pytest.mark.parametrize("names", [("part-a", "part-b"), ("model-1", "gone")], ids=["other names", "missing"])
def test_the_shards_that_the_index_names_are_fetched_or_missed(hubs: Hubs, names: tuple[str, str]) -> None:
    weights = random_weights(1)
    half = {name: weights[name] for name in sorted(weights)[:3]}
    rest = {name: weights[name] for name in weights if name not in half}
    index = {
        name: f"{names[0] if name in half else names[1]}.safetensors" for name in weights
    }  # tensor -> file
    files = {
        "model.safetensors.index.json": json.dumps({"weight_map": index}).encode(),
        f"{names[0]}.safetensors": save(half),
    }
    if names[1] != "gone":
        files[f"{names[1]}.safetensors"] = save(rest)
    hubs.hf.repositories["org/base"].commit(files, alone=True)
    if names[1] == "gone":
        with pytest.raises(HubError, match=r"gone\.safetensors"):
            fetch("hf:org/base")
    else:
        (folder,) = fetch("hf:org/base").paths
        assert {file.name for file in folder.glob("*.safetensors")} == {
            f"{name}.safetensors" for name in names
        }


def test_locked_paths_are_there_though_the_lock_was_cut_short(
    hubs: Hubs, recipe: Path, tmp_path: Path
) -> None:
    fetch(recipe)
    lock = lock_path(recipe)
    head, _, tail = lock.read_text().partition("files = [")
    lock.write_text(f"{head}files = [{tail[tail.index(chr(10) + ']') :]}")
    with pytest.raises((InputError, UsageError)):
        fetch(recipe, locked=True, into=tmp_path / "other")


def test_a_dry_run_converts_nothing(hubs: Hubs, recipe: Path) -> None:
    with_local_pickle(recipe)
    fetch(recipe, dry_run=True, allow_pickle=True)
    assert not hubs.store.exists()


def test_a_refused_pickle_on_this_machine_is_found_before_anything_is_touched(
    hubs: Hubs, recipe: Path
) -> None:
    with_local_pickle(recipe)
    with pytest.raises(UsageError, match="pickle"):
        fetch(recipe)
    assert not lock_path(recipe).exists()
    assert not hubs.store.exists()


def test_a_recipe_with_a_pickle_on_this_machine_can_be_merged_once_it_was_fetched(
    hubs: Hubs, recipe: Path, tmp_path: Path
) -> None:
    with_local_pickle(recipe)
    fetch(recipe, allow_pickle=True)
    mergecli.merge(recipe, method="average", output=tmp_path / "out.safetensors")


def with_local_pickle(recipe: Path) -> None:
    (recipe.parent / "old.bin").write_bytes(pickled(1))
    recipe.write_text('base = "hf:org/base"\n[tuned]\nbirds = "old.bin"\n')


def test_what_was_converted_with_leave_is_fetched_again_without_it(hubs: Hubs) -> None:
    hubs.hf.repositories["org/base"].commit({"pytorch_model.bin": pickled(1)}, alone=True)
    paths = fetch("hf:org/base", allow_pickle=True).paths
    assert fetch("hf:org/base").paths == paths


def test_what_was_killed_is_taken_up_and_verified(hubs: Hubs) -> None:
    head = hubs.hf.repositories["org/base"].head
    partial = hubs.store / f"hf/org/base/{head}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors.incomplete").write_bytes(b"not the beginning of it")
    (folder,) = fetch("hf:org/base").paths
    assert load_file(folder / "model.safetensors").keys() == random_weights(0).keys()
    assert not partial.exists()
    fetch("hf:org/base", verify=True)


@pytest.mark.parametrize("values", [",", " , ,"])
def test_a_sweep_over_nothing_is_refused(values: str, tmp_path: Path, run: Run) -> None:
    axis = f"method.density={values}"
    ended = run(
        "merge", "--base", "toy:base", "toy:digits", "--method", "ties", "--sweep", axis, "-o", "swept"
    )
    assert (ended.status, ended.out) == (2, "")
    assert axis.strip() in ended.err


def test_the_recipe_of_a_pool_outlives_it(tmp_path: Path) -> None:
    modules = {"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(2, 3)}
    merged = mergecli.merge(
        mergecli.ModelPool(modules).recipe, method="average", output=tmp_path / "a.safetensors"
    )
    assert merged.path.is_file()


def test_a_module_is_a_base_as_good_as_any(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\n')
    (vector,) = mergecli.taskvector(recipe, output=tmp_path / "vectors")
    base = mergecli.ModelPool({"base": "toy:base"}).load_model()
    pool = mergecli.ModelPool({"base": base, "digits": vector})
    assert pool.has_base
    assert pool.load_model("digits") is not None


def test_a_configuration_that_cannot_be_is_an_error_of_the_file(tmp_path: Path) -> None:
    from shutil import copytree

    from mergecli.clip.model import load_clip
    from tests.support.tiny_clip import make_tiny_clip

    folder = copytree(make_tiny_clip(tmp_path / "clip"), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json|cannot be loaded"):
        load_clip(folder)


def test_a_recipe_in_a_folder_with_a_space_and_umlauts_is_locked_beside_it(
    hubs: Hubs, tmp_path: Path
) -> None:
    folder = tmp_path / "mit leer ü"
    folder.mkdir()
    recipe = folder / "ré cipe.v1.toml"
    recipe.write_text(RECIPE)
    (written,) = fetch(recipe).locks
    assert written == folder / "ré cipe.v1.lock"
    written.write_bytes(written.read_bytes().replace(b"\n", b"\r\n"))
    hubs.forget()
    assert len(fetch(recipe, locked=True).paths) == 3
    assert hubs.asked == []
