"""What cannot be written as a mixture, and what a task's tower is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergecli
from mergecli.formats.mixture import mixture_of
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint
from tests.support.mixture_scores import LEARNED, TASKS, WEIGHT, counts, refuse, scores


@pytest.mark.parametrize("name", ["masks.a.weight", "unified.layer.weight", "rescalers.a", "router.a"])
def test_names_that_a_mixture_has_for_its_own_tensors_are_refused_before_anything_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergecli.merging.models.Models.map", refuse)
    for file in ("base", "a"):
        save_file({name: torch.ones(2), "layer.weight": torch.ones(2)}, tmp_path / f"{file}.safetensors")
    models, base = {"a": tmp_path / "a.safetensors"}, tmp_path / "base.safetensors"
    with pytest.raises(InputError, match=rf"base\.safetensors: `{name}`: expected names that") as raised:
        mergecli.merge(models, base=base, method="emr", output=tmp_path / "m.safetensors")
    assert "`masks.`" in raised.value.hint
    monkeypatch.undo()
    mergecli.merge(models, base=base, method="average", output=tmp_path / "m.safetensors")


@pytest.mark.parametrize("method", ["smile"])
def test_models_without_a_layer_that_the_method_has_experts_for_are_refused(
    tmp_path: Path, method: str
) -> None:
    for file in ("base", "a"):
        save_file({"layer.weight": torch.ones(2, 2)}, tmp_path / f"{file}.safetensors")
    models, base = {"a": tmp_path / "a.safetensors"}, tmp_path / "base.safetensors"
    with pytest.raises(InputError, match=rf"expected tensors that `{method}` has experts for, got none"):
        mergecli.merge(models, base=base, method=method, output=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_experts_of_full_rank_take_no_more_room_than_models(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    mergecli.merge(place / "r.toml", method="smile", settings={"rank": 9999}, output=output)
    size = float(mergecli.info(output).mixture["relative size"].split()[0])
    assert size < 1 + len(TASKS) * 1.1
    with open_checkpoint(output) as stored:
        tower = mixture_of(stored).of_task("two")
        assert_near(tower.read(WEIGHT), load_file(place / "two.safetensors")[WEIGHT])


@pytest.mark.parametrize("method", LEARNED)
def test_one_task_with_all_of_its_entries_and_a_factor_of_one_is_that_tasks_model(
    place: Path, tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {"start": 1.0, "steps": 0, "router_spread": 0.0}
    settings |= {"density": 1.0} if method == LEARNED[1] else {}
    recipe, output = tmp_path / "r.toml", tmp_path / "m.safetensors"
    text = f'base = "{place}/clip"\n[tuned]\none = "{place}/one.safetensors"\n[tasks.one]\n'
    recipe.write_text(f'{text}data = "{place}/images/one"\ntemplates = ["a {{}} picture"]\n')
    mergecli.merge(recipe, method=method, settings=settings, output=output)
    want = load_file(place / "one.safetensors")
    with open_checkpoint(output) as stored:
        tower = mixture_of(stored).of_task("one")
        for name, value in want.items():
            assert_near(tower.read(name), value)
    got, alone = (scores(place, each, tasks=["one"])["one"] for each in (output, place / "one.safetensors"))
    assert got == (alone[0], pytest.approx(alone[1], abs=1e-5))


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "tower"),
    [
        ("emr", None),
        (LEARNED[0], "that task's MLPs; the rest is shared by all tasks"),
        (LEARNED[1], "that task's MLPs, pruned; the rest is shared by all tasks"),
    ],
)
def test_info_of_a_task_says_what_its_tower_is_and_what_its_file_would_take(
    place: Path, tmp_path: Path, method: str, tower: str | None
) -> None:
    settings = {"steps": 0} if method in LEARNED else {}
    output = tmp_path / "m.safetensors"
    mergecli.merge(
        place / "r.toml", method=method, settings=settings, changes=["dtype=float16"], output=output
    )
    found = mergecli.info(f"{output}#one")
    assert found.metadata.get("tower") == tower
    assert (found.files, found.size) == (0, 2 * found.parameters)
    assert set(found.dtypes) == {"F32"}
    (result,) = mergecli.evaluate(f"{output}#one", recipe=place / "r.toml", tasks=["one"], limit=3)
    one = sum(each.nbytes for each in load_file(place / "one.safetensors").values())
    assert (result.bytes, result.relative_size) == (one / 2, 0.5)


def test_a_plain_tower_called_a_mixture_is_refused(place: Path, tmp_path: Path) -> None:
    with safe_open(place / "emr.safetensors", "pt") as file:
        metadata: dict[str, str] = file.metadata()
    save_file(load_file(place / "one.safetensors"), tmp_path / "liar.safetensors", metadata)
    for attempt in (
        lambda: counts(place, tmp_path / "liar.safetensors"),
        lambda: mergecli.info(tmp_path / "liar.safetensors"),
    ):
        with pytest.raises(
            InputError, match=r"liar\.safetensors: is not what its metadata says, `emr` of 3 tasks"
        ):
            attempt()


def test_a_task_of_a_file_with_one_tower_is_refused(place: Path) -> None:
    with pytest.raises(InputError, match="the file holds one tower"):
        mergecli.info(f"{place}/one.safetensors#one")


def test_a_dtype_of_a_whole_mixture_is_refused_and_of_one_of_its_towers_is_not(
    place: Path, tmp_path: Path
) -> None:
    def recipe(source: str) -> Path:
        path = tmp_path / "r.toml"
        tuned = f'one = {{ source = "{place}/{source}", dtype = "float16" }}\ntwo = "{place}/two.safetensors"'
        path.write_text(f'base = "{place}/clip"\n[tuned]\n{tuned}\n')
        return path

    merged = mergecli.merge(
        recipe("emr.safetensors#one"), method="average", output=tmp_path / "m.safetensors"
    )
    assert merged.tasks == ("one", "two")
    with pytest.raises(InputError, match="holds several towers, to which no `dtype` applies") as raised:
        mergecli.merge(recipe("emr.safetensors"), method="average", output=tmp_path / "n.safetensors")
    assert raised.value.hint == "name one of them, `FILE#TASK`, or leave it out"
