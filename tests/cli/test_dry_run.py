"""`--dry-run`: what it refuses and how, that nothing is written, and that its numbers are those of the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli import methods
from mergecli.clip import timing
from mergecli.merging.models import Models
from mergecli.methods._base import DataDriven
from mergecli.methods._modifier import Modifier
from mergecli.training import loop
from tests.conftest import Run, World
from tests.support.adapted_world import AdaptedWorld, make_adapted_world

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how long things take, so that one measurement of each does."""
    monkeypatch.setattr(timing, "LONG_ENOUGH", 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(made: AdaptedWorld, tmp_path: Path) -> Path:
    """The test's own folder, with a copy of everything in it."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with its size and the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


MERGE = ["merge", "recipe.toml", "--method", "average", "-o", "m.safetensors"]
EVAL = ["eval", "one.safetensors", "--recipe", "recipe.toml"]
FINETUNE = ["finetune", "recipe.toml", "--task", "one", "--steps", "3", "-o", "tuned.safetensors"]
ADA = ["merge", "recipe.toml", "--method", "ada_merging", "--set", "method.steps=2", "-o", "m.safetensors"]
SWEEP = ["eval", "--recipe", "recipe.toml", "--method", "ties", "--sweep", "method.density=0.2,0.4"]

WRONG: dict[str, tuple[list[str], int]] = {
    "no recipe": (["merge", "none.toml", "--method", "average", "-o", "m.safetensors"], 3),
    "unknown method": (["merge", "recipe.toml", "--method", "avrage", "-o", "m.safetensors"], 2),
    "wrong setting": ([*MERGE[:2], "--method", "ties", "--set", "method.density=2", *MERGE[-2:]], 2),
    "missing model": ([*MERGE, "--set", 'tuned.one="none.safetensors"'], 3),
    "models that do not fit": ([*MERGE, "--set", 'tuned.one="other.safetensors"'], 3),
    "NaN": ([*MERGE, "--set", 'tuned.one="nan.safetensors"'], 3),
    "wrong suffix": ([*MERGE[:-1], "m.txt"], 2),
    "a folder in the way": ([*MERGE[:-1], "folder.safetensors"], 2),
    "a file as folder": ([*MERGE[:-1], "one.safetensors/m.safetensors"], 3),
    "an input": ([*MERGE[:-1], "one.safetensors"], 2),
    "shards of a file": ([*MERGE, "--shard-size", "1KB"], 2),
    "unknown device": ([*MERGE, "--device", "abacus"], 2),
    "coefficients of a method without": ([*MERGE, "--coefficients", "one.safetensors"], 2),
    "coefficients that are none": ([*ADA, "--coefficients", "one.safetensors"], 3),
    "images that are missing": ([*ADA, "--set", 'tasks.one.data="none"'], 3),
    "a split that there is not": ([*ADA, "--set", 'tasks.one.split="dev"'], 2),
    "a base that is no CLIP": ([*ADA, "--set", 'base="one.safetensors"'], 3),
    "a prompt that is too long": ([*ADA, "--set", f'tasks.one.templates=["{"long " * 30}{{}}"]'], 3),
    "statistics of another model": (
        ["merge", "recipe.toml", "--method", "fisher", "--statistics", "statistics", "-o", "m.safetensors"], 3,
    ),
    "no merged tower": (["merge", "recipe.toml", "--method", "representation_surgery", "-o", "m.safetensors"], 2),
    "a sweep into a file": ([*MERGE[:2], "--method", "ties", "--sweep", "method.density=0.2,0.4", *MERGE[-2:]], 2),
    "a wrong value of a sweep": ([*MERGE[:2], "--method", "ties", "--sweep", "method.density=2,3", "-o", "s"], 2),
    "eval of nothing": (["eval", "none.safetensors", "--recipe", "recipe.toml"], 3),
    "eval on an unknown task": ([*EVAL, "--tasks", "fuor"], 2),
    "eval on a split that there is not": ([*EVAL, "--split", "dev"], 2),
    "eval of a tower that does not fit": (["eval", "other.safetensors", "--recipe", "recipe.toml"], 3),
    "eval into a wrong file": ([*EVAL, "--predictions", "p.csv"], 2),
    "eval with a long prompt": ([*EVAL, "--set", f'tasks.one.templates=["{"long " * 30}{{}}"]'], 3),
    "eval of routes without": ([*EVAL, "--routes", "routes"], 2),
    "eval of a sweep on a split that there is not": ([*SWEEP, "--split", "dev"], 2),
    "eval of a sweep with a model missing": ([*SWEEP, "--set", 'tuned.one="none.safetensors"'], 3),
    "finetune on an unknown task": ([*FINETUNE, "--task", "fuor"], 2),
    "finetune with a wrong number": ([*FINETUNE, "--learning-rate", "0"], 2),
    "finetune into a wrong file": ([*FINETUNE[:-1], "tuned.txt"], 2),
    "finetune on missing images": ([*FINETUNE, "--set", 'tasks.one.data="none"'], 3),
    "finetune with a long prompt": ([*FINETUNE, "--set", f'tasks.one.templates=["{"long " * 30}{{}}"]'], 3),
    "finetune of layers that there are not": ([*FINETUNE[:-1], "a", "--lora", "--target-modules", "none"], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_the_work_refuses_a_dry_run_refuses_with_the_same_status_and_message(
    place: Path, run: Run, name: str
) -> None:
    command, status = WRONG[name]
    tower = load_file(place / "one.safetensors")
    first = next(iter(tower))
    save_file({**tower, first: tower[first] * torch.nan}, place / "nan.safetensors")
    save_file({**tower, first: torch.ones(3)}, place / "other.safetensors")
    (place / "folder.safetensors").mkdir()
    (place / "statistics").mkdir()
    shutil.copy(place / "one.safetensors", place / "statistics" / "one.safetensors")
    before = tree(place)
    planned = run(*command, "--dry-run")
    assert tree(place) == before
    worked = run(*command)
    assert planned.status == status, planned.err
    assert (planned.status, planned.out, planned.err) == (worked.status, worked.out, worked.err)
    assert "hint: please report" not in planned.err


RIGHT: dict[str, list[str]] = {
    "merge": MERGE,
    "merge into a folder": [*MERGE[:-1], "folder"],
    "merge into shards": [*MERGE[:-1], "folder", "--shard-size", "20KB"],
    "merge a sweep": [*MERGE[:2], "--method", "ties", "--sweep", "method.density=0.2,0.4", "-o", "swept"],
    "measure": ["merge", "recipe.toml", "--method", "fisher", "--set", "method.examples=4", *MERGE[-2:]],
    "measure in files of the memory": ["merge", "recipe.toml", "--method", "reg_mean_plus_plus", *MERGE[-2:]],
    "learn": ADA,
    "learn anew": [*ADA, "--trace", "t.csv", "--save-coefficients", "c.safetensors"],
    "eval": [*EVAL, "-o", "one.json"],
    "eval with features": [*EVAL, "--features", "features", "--predictions", "p.parquet"],
    "eval a sweep": [*SWEEP, "-o", "results", "--select", "validation"],
    "finetune": FINETUNE,
    "finetune an adapter": [*FINETUNE[:-1], "adapter", "--lora", "--validate-every", "1", "--fresh"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_dry_run_writes_and_removes_nothing_and_then_the_work_is_done(
    place: Path, run: Run, name: str
) -> None:
    (place / ".m.safetensors.999999999-00000000.part").write_text("left by a program that was killed")
    (place / ".adapter.resume.safetensors").write_text("a damaged resume file")
    before = tree(place)
    planned = run(*RIGHT[name], "--dry-run", "--json")
    assert planned.status == 0, planned.err
    assert tree(place) == before
    plan = json.loads(planned.out)
    assert plan["command"] == RIGHT[name][0]
    assert plan["seconds"] >= 0
    assert plan["memory"] > 50e6
    worked = run(*RIGHT[name])
    assert worked.status == 0, worked.err
    targets = [Path(each["file"]) for each in plan["work"] if each["work"] == "write"]
    assert targets
    assert all((place / target).exists() for target in targets if str(target) != "a temporary folder")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass over all tensors of all models."""
    found: list[int] = []
    own = Models.map

    def counted(self: Models, work: object, sample: int = 1, **more: object) -> Iterator[object]:
        if sample == 1:
            found.append(len(self.floats))
        return own(self, work, sample, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Models, "map", counted)
    return found


PLAIN = [
    name
    for name in methods.names()
    if not issubclass(methods.find(name), DataDriven) and name not in ("mass", "smile", "weighted_average")
]


@pytest.mark.parametrize("name", PLAIN)
def test_passes_tensors_and_bytes_are_those_of_the_merge(
    world: World, run: Run, passes: list[int], name: str
) -> None:
    models = ["--base", "base.safetensors", "t1.safetensors", "t2.safetensors"]
    of = ["--set", 'method.of={name = "ties"}'] if issubclass(methods.find(name), Modifier) else []
    command = ["merge", *models, "--method", name, *of, "-o", "m.safetensors"]
    plan = json.loads(run(*command, "--dry-run", "--json").out)
    passes.clear()
    assert run(*command).status == 0
    written = [each for each in plan["work"] if each["work"] == "write"]
    in_chains = methods.find(name).kind == "continual"
    files = ["m.safetensors", *(["m.state.safetensors"] if in_chains else [])]
    assert [each["file"] for each in written] == files
    assert written[0]["tensors"] == len(load_file(world.folder / "m.safetensors"))
    sizes = [(world.folder / file).stat().st_size for file in files]
    if in_chains:  # only the merge knows what the metadata say
        assert all(0 < size - each["bytes"] < 4096 for each, size in zip(written, sizes, strict=True))
    else:
        assert plan["bytes_written"] == sizes[0]
    assert plan["passes"] == len(passes)
    read = [each for each in plan["work"] if each["work"] == "read"]
    assert [each["what"] for each in read] == [*(["base"] if len(read) > 2 else []), "t1", "t2"]
    size = sum(each.numel() * each.element_size() for each in world.base.values())
    assert plan["bytes_read"] == len(read) * len(passes) * size


def test_the_bytes_of_what_is_measured_and_learned_are_those_of_the_merge(place: Path, run: Run) -> None:
    for method, more in (
        ("fisher", "examples=4"), ("reg_mean", "examples=4"), ("ada_merging", "steps=2"), ("weight_ensembling_moe", "steps=2"),
    ):  # fmt: skip
        command = ["merge", "recipe.toml", "--method", method, "--set", f"method.{more}", *MERGE[-2:]]
        plan = json.loads(run(*command, "--dry-run", "--json").out)
        assert run(*command).status == 0
        size = (place / "m.safetensors").stat().st_size
        *kept, written = [each for each in plan["work"] if each["work"] == "write"]
        assert (written["file"], written["bytes"]) == ("m.safetensors", size)
        assert all(each.get("tensors") in (None, len(load_file(each["file"]))) for each in kept)
        again = json.loads(run(*command, "--dry-run", "--json").out)
        assert not any(each["work"] in ("measure", "learn", "decode") for each in again["work"])
        assert again["bytes_written"] == size


def test_images_and_steps_of_what_is_learned_are_told(place: Path, run: Run) -> None:
    command = [*ADA, "--set", "method.batch_size=2"]
    plan = json.loads(run(*command, "--dry-run", "--json").out)
    (learned,) = [each for each in plan["work"] if each["work"] == "learn"]
    assert (learned["images"], learned["steps"]) == (3 * 2 * 2, 2)
    decoded = {each["what"]: each["images"] for each in plan["work"] if each["work"] == "decode"}
    assert decoded == {"one": 7, "two": 8, "three": 9}


def test_a_damaged_file_of_the_store_is_to_be_made_again_and_stays(place: Path, run: Run) -> None:
    command = ["merge", "recipe.toml", "--method", "fisher", "--set", "method.examples=4", *MERGE[-2:]]
    assert run(*command).status == 0
    file = next((place / "home" / "statistics").rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = tree(place)
    planned = run(*command, "--dry-run", "--json")
    assert tree(place) == before
    measured = [each["images"] for each in json.loads(planned.out)["work"] if each["work"] == "measure"]
    assert measured == [4]
    worked = run(*command)
    assert planned.err.splitlines()[0] == worked.err.splitlines()[0]
    assert "it is made again" in worked.err


def test_an_evaluation_says_what_is_in_the_cache(place: Path, run: Run) -> None:
    def cached(*more: str) -> dict[str, dict[str, bool]]:
        found: dict[str, dict[str, bool]] = {"head": {}, "decode": {}, "evaluate": {}}
        for each in json.loads(run(*EVAL, *more, "--dry-run", "--json").out)["work"]:
            if each["work"] in found:
                found[each["work"]][each["what"]] = each["cached"]
        return found

    tasks = ("one", "two", "three")
    new = dict.fromkeys(tasks, False)
    counts = {f"one on {task}": False for task in tasks}
    assert cached() == {"head": new, "decode": new, "evaluate": counts}
    assert run(*EVAL, "--tasks", "two").status == 0
    assert cached() == {"head": {**new, "two": True}, "decode": {**new, "two": True}, "evaluate": counts}
    assert cached("--no-cache") == {"head": new, "decode": new, "evaluate": counts}


def test_a_dry_run_in_a_pipe_is_a_table_and_its_totals_are_a_message(place: Path, run: Run) -> None:
    ended = run(*MERGE, "--dry-run")
    heads, *rows = [line.split("\t") for line in ended.out.splitlines()]
    assert heads == ["work", "what", "file", "tensors", "passes", "bytes", "seconds"]
    assert [row[:2] for row in rows] == [
        ["check", ""], ["read", "one"], ["read", "two"], ["read", "three"], ["merge", "average"], ["write", "average"],
    ]  # fmt: skip
    assert ended.end.startswith("would read ")
    assert "of memory (estimates, measured for " in ended.end
    assert ended.err == ""


def test_a_training_that_was_interrupted_is_planned_from_where_it_stopped(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*more: str) -> tuple[int, int]:
        ended = run(*FINETUNE, "--batch-size", "2", *more, "--dry-run", "--json")
        (train,) = [each for each in json.loads(ended.out)["work"] if each["work"] == "train"]
        return train["steps"], train["images"]

    def stopped(self: loop.Training, losses: list[float]) -> None:
        if self.state.step == 1:
            raise KeyboardInterrupt
        update(self, losses)

    assert planned() == (3, 6)
    update = loop.Training._update
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_update", stopped)
        assert run(*FINETUNE, "--batch-size", "2").status == 130
    assert planned() == (2, 4)
    assert planned("--fresh") == (3, 6)


def test_a_disk_without_room_for_features_statistics_or_a_resume_file_is_told_before_the_work(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(place / "one.safetensors").values()
    tower = sum(each.numel() for each in tensors)
    statistics = 2 * (4 * tower + 8 * len(tensors))  # with the sum of squares of each tensor, as float64
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * tower + 1000))
    measure = ["measure", "recipe.toml", "--method", "fisher", "-o", "statistics"]
    fisher = [f"statistics/{name}.safetensors" for name in ("one", "two")]
    features = 7 * 2 * 16 * 4 + 7 * 16
    for command, file, needed in (
        (measure, fisher[1], statistics),
        (
            [*MERGE[:2], "--method", "fisher", "--statistics", "statistics", *MERGE[-2:]],
            fisher[1],
            statistics,
        ),
        (FINETUNE, ".tuned.resume.safetensors", 4 * 4 * tower),
    ):
        ended = run(*command)
        assert ended.status == 3
        assert f"error: {file}: {needed:,} bytes are to be written, and the disk has room for " in ended.err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=features - 1))
    ended = run(*EVAL, "--tasks", "one", "--features", "features")
    assert ended.status == 3
    assert f"error: features/one.safetensors: {features:,} bytes are to be written" in ended.err
    assert not (place / "statistics").exists()
    assert not (place / "features").exists()
