"""Merges that go on from an earlier one: the same bytes as a merge of all, the state beside them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.merging.merge import merge
from mergecli.merging.merge_target import Merged
from mergecli.runtime.errors import InputError, UsageError
from tests.conftest import Run, World, assert_same, make_world
from tests.support.layered_world import layered_world

ALL = ("average", "task_arithmetic", "magmax", "ties", "opcm", "dop", "nufilt")
SETTINGS: dict[str, dict[str, object]] = {"dop": {"steps": 3}, "nufilt": {"steps": 3}}


def chain(world: World, method: str, names: list[str], dtype: str | None = None) -> Merged:
    """The models one after another; every step is a file of its own."""
    previous, done = world.base_file, None
    for number, name in enumerate(names, 1):
        settings = SETTINGS.get(method) if number == 1 else None
        done = merge(
            {name: world.files[name]}, onto=previous, method=method, settings=settings, dtype=dtype,
            output=world.folder / f"{method}-{number}.safetensors",
        )  # fmt: skip
        previous = done.path
    assert done is not None
    return done


def at_once(world: World, method: str, names: list[str], dtype: str | None = None) -> Merged:
    models = {name: world.files[name] for name in names}
    return merge(
        models, base=world.base_file, method=method, settings=SETTINGS.get(method), dtype=dtype,
        output=world.folder / "at-once.safetensors",
    )  # fmt: skip


@pytest.fixture
def layered(tmp_path: Path) -> World:
    return layered_world(tmp_path, 4)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "magmax", "dop", "nufilt"])
def test_a_chain_has_the_bytes_of_a_merge_of_all(layered: World, method: str, dtype: str | None) -> None:
    names = ["t2", "t4", "t1", "t3"]
    done = chain(layered, method, names, dtype)
    assert done.digest == at_once(layered, method, names, dtype).digest
    assert done.tasks == tuple(names)


def test_ties_has_them_for_two_models_and_opcm_up_to_rounding(layered: World) -> None:
    assert chain(layered, "ties", ["t1", "t2"]).digest == at_once(layered, "ties", ["t1", "t2"]).digest
    names = ["t1", "t2", "t3", "t4"]
    one, other = chain(layered, "opcm", names), at_once(layered, "opcm", names)
    assert_same(load_file(one.path), load_file(other.path), atol=1e-6)


def test_several_new_models_at_once_are_as_many_steps(layered: World) -> None:
    first = merge(
        {"t1": layered.files["t1"]}, onto=layered.base_file, method="average", output="a.safetensors"
    )
    rest = {name: layered.files[name] for name in ("t2", "t3")}
    done = merge(rest, onto=first.path, method="average", output="b.safetensors")
    assert done.digest == at_once(layered, "average", ["t1", "t2", "t3"]).digest


def test_the_state_says_what_the_chain_is_and_holds_no_more_than_is_needed(layered: World) -> None:
    done = chain(layered, "opcm", ["t1", "t2"])
    assert done.state == layered.folder / "opcm-2.state.safetensors"
    with safe_open(done.state, "pt") as state:
        facts, keys = json.loads(state.metadata()["chain"]), list(state.keys())
    assert keys == ["chain.experts"]
    assert list(facts["experts"]) == ["t1", "t2"]
    assert facts["model"] == done.digest
    assert len(facts["numbers"]["norms"]) == 2
    half = chain(layered, "opcm", ["t1", "t2"], "float16")
    assert half.state is not None
    kept = load_file(half.state)
    assert_same({name: kept[name].half() for name in kept if name != "chain.experts"},
                {name: value for name, value in load_file(half.path).items() if value.is_floating_point()})  # fmt: skip
    sums = chain(layered, "average", ["t1", "t2"])
    assert sums.state is not None
    both = [layered.tuned["t1"], layered.tuned["t2"]]
    assert load_file(sums.state)["scale"].equal(both[0]["scale"] + both[1]["scale"])


def test_a_merge_that_is_no_chain_goes_on_and_says_that_it_rounds(layered: World, run: Run) -> None:
    for method in ("average", "task_arithmetic"):
        old = at_once(layered, method, ["t1", "t2"])
        ended = run("merge", "--onto", old.path, layered.files["t3"], "-o", "next.safetensors")
        assert ended.status == 0
        assert "note: at-once.safetensors: was no step of a chain" in ended.err.replace(
            f"{layered.folder}/", ""
        )
        want = load_file(at_once(layered, method, ["t1", "t2", "t3"]).path)
        assert_same(load_file("next.safetensors"), want, atol=2e-6)


def test_the_first_model_may_stand_for_the_first_merge(layered: World) -> None:
    done = merge(
        {"t2": layered.files["t2"]}, base=layered.base_file, onto=layered.files["t1"], method="opcm",
        output="two.safetensors",
    )  # fmt: skip
    assert done.digest == at_once(layered, "opcm", ["t1", "t2"]).digest
    assert done.tasks == ("t1", "t2")


def test_a_folder_goes_on_from_a_folder(layered: World) -> None:
    names = ["t1", "t2"]
    previous = layered.base_file
    for number, name in enumerate(names):
        done = merge(
            {name: layered.files[name]}, onto=previous, method="average", output=f"step{number}", card=False
        )
        previous = done.path
        assert done.state == Path(f"step{number}.state.safetensors")
    assert done.digest == at_once(layered, "average", names).digest


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_what_a_sum_has_can_be_taken_out_and_replaced(layered: World, method: str) -> None:
    done = chain(layered, method, ["t1", "t2", "t3"])
    without = merge({}, onto=done.path, without=["t2"], output="without.safetensors")
    assert without.tasks == ("t1", "t3")
    want = load_file(at_once(layered, method, ["t1", "t3"]).path)
    assert_same(load_file(without.path), want, atol=1e-6)
    replaced = merge(
        {"t2": layered.files["t4"]},
        onto=done.path,
        replace=f"t2={layered.files['t2']}",
        output="replaced.safetensors",
    )
    want = load_file(at_once(layered, method, ["t1", "t3", "t4"]).path)
    assert_same(load_file(replaced.path), want, atol=1e-6)
    again = merge({"t2": layered.files["t2"]}, onto=without.path, output="again.safetensors")
    assert again.tasks == ("t1", "t3", "t2")


REASONS = {
    "magmax": "of each entry only the largest is remembered, and not the next one",
    "ties": "signs were elected and entries trimmed with it, and what lost is not remembered",
    "opcm": "later task vectors were projected away from it, and are not remembered",
    "dop": "it is part of the start and of the aim of every descent after it",
    "nufilt": "later task vectors were kept out of its directions, and are not remembered",
}


@pytest.mark.parametrize("method", REASONS)
def test_other_methods_say_why_they_cannot(layered: World, method: str) -> None:
    done = chain(layered, method, ["t1", "t2"])
    for option, more in (("--without", {"without": ["t1"]}), ("--replace", {"replace": "t1"})):
        with pytest.raises(UsageError) as caught:
            merge({"t1": layered.files["t3"]}, onto=done.path, output="x.safetensors", **more)
        assert caught.value.message == f"{option}: `{method}` cannot take `t1` out again: {REASONS[method]}"
        assert caught.value.hint == "merge the other models again"


def test_a_step_has_the_chains_seed_unless_it_names_another(layered: World) -> None:
    new, output = {"t3": layered.files["t3"]}, layered.folder / "x.safetensors"
    two = merge(
        {"t1": layered.files["t1"]}, onto=layered.base_file, method="opcm", changes=["seed=7"],
        output=layered.folder / "one.safetensors",
    )  # fmt: skip
    for seed in (0, 8):
        with pytest.raises(UsageError) as caught:
            merge(new, onto=two.path, changes=[f"seed={seed}"], output=output)
        assert caught.value.message == f"{two.path}: its chain has seed 7, got {seed}"
        assert caught.value.hint == "write `--set seed=7`"
    assert "seed = 7" in mergecli.info(merge(new, onto=two.path, output=output).path).metadata["recipe"]


def test_what_does_not_go_on_is_refused(layered: World) -> None:
    two = chain(layered, "opcm", ["t1", "t2"])
    new = {"t3": layered.files["t3"]}
    place = f"{two.path}: its chain"
    cases: list[tuple[dict[str, object], str]] = [
        ({"method": "average"}, f"{place} is merged by `opcm`, got `average`"),
        ({"method": "opcm", "settings": {"alpha": 0.4}}, f"{place} has `method.alpha` = 0.5, got 0.4"),
        ({"dtype": "bfloat16"}, f"{place} is in dtype `same`, got `bfloat16`"),
        ({"changes": ["seed=7"]}, f"{place} has seed 0, got 7"),
        (
            {"without": ["t9"]},
            "--without: `t9` is not in the merge; there are `t1`, `t2`",
        ),
    ]
    for more, message in cases:
        with pytest.raises(UsageError) as caught:
            merge(new, onto=two.path, output="x.safetensors", **more)  # type: ignore[arg-type]
        assert caught.value.message == message
    with pytest.raises(UsageError, match="`t2` is in the merge already"):
        merge({"t2": layered.files["t3"]}, onto=two.path, output="x.safetensors")
    with pytest.raises(
        UsageError, match="`tsv_m` needs all models at once, and cannot go on from an earlier merge"
    ):
        merge(new, onto=layered.base_file, method="tsv_m", output="x.safetensors")
    with pytest.raises(UsageError, match="a step of a chain is of whole weights"):
        merge(new, onto=layered.base_file, method="average", as_adapter=True, output="x")
    line = 'method.layers=[{match="*", scaling_factor=0.1}]'
    with pytest.raises(
        UsageError, match="a merge that others go on from has the same settings in every layer"
    ):
        merge(new, onto=layered.base_file, method="ties", changes=[line], output="x.safetensors")
    with pytest.raises(UsageError, match="--without: of which merge"):
        merge(new, base=layered.base_file, method="average", without=["t1"], output="x.safetensors")
    with pytest.raises(InputError, match="is another base"):
        merge(new, base=layered.files["t4"], onto=two.path, output="x.safetensors")
    assert not Path("x.safetensors").exists()
    assert not Path("x.state.safetensors").exists()


def test_a_state_of_another_model_and_a_missing_or_damaged_one_are_refused(layered: World) -> None:
    two, other = chain(layered, "opcm", ["t1", "t2"]), chain(layered, "dop", ["t1", "t2"])
    new, state = {"t3": layered.files["t3"]}, layered.folder / "opcm-2.state.safetensors"
    kept = state.read_bytes()
    shutil.copy(layered.folder / "dop-2.state.safetensors", state)
    with pytest.raises(InputError) as caught:
        merge(new, onto=two.path, output="x.safetensors")
    assert (
        caught.value.message
        == f"{state}: is the state of another model ({other.digest}) than {two.path} ({two.digest})"
    )
    state.unlink()
    with pytest.raises(InputError) as caught:
        merge(new, onto=two.path, output="x.safetensors")
    assert (
        caught.value.message
        == f"{two.path}: is a step of a chain, and its state is not beside it: expected {state}"
    )
    state.write_bytes(kept[:200] + b"x" + kept[201:])
    with pytest.raises(InputError, match=r"is damaged|not a safetensors"):
        merge(new, onto=two.path, output="x.safetensors")
    state.write_bytes(kept)
    weights = load_file(two.path)
    weights["scale"] += 1
    save_file(weights, two.path)
    with pytest.raises(InputError, match="is the state of another model"):
        merge(new, onto=two.path, output="x.safetensors")


def test_models_that_do_not_fit_and_inputs_as_outputs_are_refused(layered: World, tmp_path: Path) -> None:
    done = chain(layered, "average", ["t1"])
    small = tmp_path / "small.safetensors"
    save_file({"scale": torch.tensor(1.0)}, small)
    with pytest.raises(InputError, match="the checkpoints do not fit together"):
        merge({"small": small}, onto=done.path, output="x.safetensors")
    with pytest.raises(UsageError, match="the output would replace an input"):
        merge({"t2": layered.files["t2"]}, onto=done.path, output=done.path)


def test_the_command_needs_no_base_and_no_method_after_the_first_step(tmp_path: Path, run: Run) -> None:
    world = make_world(tmp_path)
    first = run(
        "merge", "--onto", "base.safetensors", "t1.safetensors", "--method", "opcm", "-o", "1.safetensors"
    )
    assert (first.status, first.out) == (0, "1.safetensors\n")
    assert first.err == "note: base.safetensors: a chain begins on it\n"
    second = run("merge", "--onto", "1.safetensors", "t2.safetensors", "-o", "2.safetensors", "--json")
    assert (second.status, second.err) == (0, "")
    assert json.loads(second.out)["state"] == "2.state.safetensors"
    assert json.loads(second.out)["tasks"] == ["t1", "t2"]
    third = run("merge", "--onto", "2.safetensors", "-o", "3.safetensors")
    assert (third.status, third.err) == (2, "error: there are no fine-tuned models to merge\nhint: name a recipe, or models as arguments\n")  # fmt: skip
    planned = run("merge", "--onto", "2.safetensors", "t3.safetensors", "-o", "3.safetensors", "--dry-run")
    assert planned.status == 0
    assert not Path("3.safetensors").exists()
    shown = run("info", "2.state.safetensors")
    assert "kind\tstate of a chain (no model)\n" in shown.out
    refused = run("eval", "2.state.safetensors", "--clip", "toy:base", "--task", "digits")
    assert refused.status == 3
    assert refused.err.endswith("hint: it is what a chain remembers: name the model that it stands beside\n")
    assert world.folder == tmp_path


def test_the_base_is_looked_for_beside_the_merge(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    world = make_world(tmp_path / "here")
    done = chain(world, "average", ["t1"])
    there = tmp_path / "there"
    there.mkdir()
    for file in (done.path, done.state):
        assert file is not None
        shutil.copy(file, there)
    with pytest.raises(UsageError) as caught:
        merge({"t2": world.files["t2"]}, onto=there / done.path.name, output="x.safetensors")
    assert (
        str(caught.value) == "base: `base.safetensors` is not beside the merge\nhint: name it with `--base`"
    )
    named = merge(
        {"t2": world.files["t2"]}, base=world.base_file, onto=there / done.path.name, output="x.safetensors"
    )
    assert named.digest == mergecli.info("x.safetensors").digest
