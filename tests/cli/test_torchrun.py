"""Commands in several processes, as `torchrun` starts them: the work of one process is shared, and the first one talks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import pytest
from safetensors.torch import load_file

from tests.conftest import Run, assert_same, without_end
from tests.support.adapted_world import AdaptedWorld, make_adapted_world
from tests.support.image_zoo import make_zoo
from tests.support.kept_files import flip
from tests.support.tiny_clip import make_image_task, make_tiny_clip

pytestmark = pytest.mark.usefixtures("own_store")

SHORT = ["--steps", "8", "--learning-rate", "1e-3", "--seed", "3"]
FEW = ["--set", "method.examples=8", "--set", "method.batch_size=4"]
LEARN = ["--set", "method.batch_size=3", "--set", "method.learning_rate=0.01"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks to train on; 24 images of `even` fill whole batches."""
    folder = tmp_path_factory.mktemp("finetune")
    make_tiny_clip(folder / "base", seed=1)
    make_image_task(folder / "tints")
    make_image_task(folder / "shades", classes=("dark", "bright"), train=20, seed=4)
    make_image_task(folder / "even", train=24, seed=7)
    text = 'schema = 1\nbase = "base"\n'
    for name in ("tints", "shades", "even"):
        text += f'[tasks.{name}]\ndata = "{name}"\ntemplates = ["something {{}}"]\n'
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("adapting"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    make_zoo(folder)
    return folder / "zoo.toml"


PROGRAM = """
import json, sys
from mergecli.cli import run
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import is_first
interrupts.watch()
ended = []
for command in json.loads(sys.argv[1]):
    ended.append(int(run(command)))
    interrupts.received = 0
if is_first():
    print(ended)
"""
"""Several commands one after another, since it takes long to start."""


def torchrun(
    count: int, commands: Sequence[Sequence[object]], folder: Path, before: str = ""
) -> tuple[list[str], list[str]]:
    """What `count` processes print that run the commands, and what they say on stderr, line by line: all of the first one's,
    then all of the second one's.

    Args:
        before: Python that each process executes first.
    """
    program = folder / "program.py"
    program.write_text(before + PROGRAM)
    text = json.dumps([list(map(str, each)) for each in commands])
    logs = Path(mkdtemp(dir=folder))  # a file for each process: on one stream their lines would mix
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
         "--log-dir", str(logs), "--redirects", "3", str(program), text],
        env={**os.environ, "MERGECLI_HOME": str(folder / "home of several"), "OMP_NUM_THREADS": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    out, err = (
        "".join(file.read_text() for file in sorted(logs.rglob(f"{stream}.log")))
        for stream in ("stdout", "stderr")
    )
    assert done.returncode == 0, done.stderr + err
    return out.splitlines(), without_end(err).splitlines()


def test_a_command_that_is_not_shared_is_done_by_the_first_process_alone(
    world: AdaptedWorld, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    command = ["eval", world.recipe.parent / "base", "--recipe", world.recipe, "-o", output]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = run(*command)
    assert (second.status, second.out, second.err) == (0, "", "")
    assert not output.exists()
    monkeypatch.setenv("RANK", "0")
    first = run(*command)
    assert first.status == 0
    assert (
        "note: `eval` is not shared by the processes of `torchrun`: the first one did all of it" in first.err
    )
    assert output.exists()
    assert os.environ["WORLD_SIZE"] == "2"


HINT = "hint: `torchrun` sets WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT: use it, or unset WORLD_SIZE\n"


@pytest.mark.parametrize(
    ("size", "rank", "said"),
    [
        ("abc", "0", "error: WORLD_SIZE: expected a whole number, got `abc`\n" + HINT),
        (
            "2",
            "x",
            "process x: error: RANK: expected a number from 0 to 1, as WORLD_SIZE is 2, got `x`\nprocess x: "
            + HINT,
        ),
        (
            "2",
            "5",
            "process 5: error: RANK: expected a number from 0 to 1, as WORLD_SIZE is 2, got `5`\nprocess 5: "
            + HINT,
        ),
    ],
)
def test_an_environment_that_is_not_of_torchrun_is_refused(
    size: str, rank: str, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    ended = run("methods", "ties")
    assert (ended.status, ended.out, ended.err) == (2, "", said)


def merge(world: AdaptedWorld, name: str, method: str, *more: str) -> list[str]:
    settings = [part for setting in more for part in ("--set", f"method.{setting}")]
    return ["merge", str(world.recipe), "--method", method, *LEARN, *settings, "-o", f"{name}.safetensors",
            "--save-coefficients", f"{name}.learned.safetensors"]  # fmt: skip


def expect_the_same_learned(world: AdaptedWorld, one: Path, two: Path) -> None:
    got, want = load_file(two), load_file(one)
    assert (got["trace.entropies"] - want["trace.entropies"]).abs().max() < 1e-5
    matter = [place for place, name in enumerate(world.base) if not name.endswith("k_proj.bias")]
    # sums of the tasks' gradients round otherwise; keys' biases have none but rounding
    assert (got["coefficients"] - want["coefficients"])[:, matter].abs().max() < 1e-3 * 0.01


def test_two_processes_train_measure_and_learn_what_one_does_and_the_first_one_talks(
    recipe: Path, zoo: Path, world: AdaptedWorld, run: Run, tmp_path: Path
) -> None:
    train = ["finetune", recipe, "--task", "even", *SHORT, "--batch-size", 4]
    measure = ["measure", zoo, "--method", "fisher", *FEW, "-o"]
    out, err = torchrun(
        2,
        [
            [*train, "-o", "two.safetensors"],
            [*measure, "two"],
            merge(world, "two.merged", "ada_merging", "steps=3"),
            ["finetune", recipe, "--task", "even", "--rank", 4, "-o", "refused"],
        ],
        tmp_path,
    )
    statistics = [f"two/{name}.safetensors" for name in "abc"]
    assert out == ["two.safetensors", *statistics, "two.merged.safetensors", "[0, 0, 0, 2]"]
    refusal = "error: `rank`: only low-rank adapters have it"
    assert sorted(line for line in err if refusal in line) == [refusal, f"process 1: {refusal}"]
    assert run(*train, "--accumulate", 2, "-o", "one.safetensors").status == 0
    assert_same(load_file(tmp_path / "two.safetensors"), load_file(tmp_path / "one.safetensors"))
    assert run(*measure, "one").status == 0
    for each in "abc":
        one, two = (tmp_path / folder / f"{each}.safetensors" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert run(*merge(world, "one.merged", "ada_merging", "steps=3")).status == 0
    expect_the_same_learned(
        world, *(tmp_path / f"{name}.merged.learned.safetensors" for name in ("one", "two"))
    )


def losses(trace: Path) -> list[list[float]]:
    """The table without its head; -1 where a cell is empty."""
    rows = trace.read_text().splitlines()[1:]
    return [[float(cell or -1) for cell in row.split(",")] for row in rows]


def share_apart(one: Path, other: Path, tolerance: float) -> float:
    """Of all weights, those that are further apart."""
    got, want = load_file(one), load_file(other)
    assert sorted(got) == sorted(want)
    apart = sum(int(((got[name] - want[name]).abs() > tolerance).sum()) for name in want)
    return apart / sum(each.numel() for each in want.values())


@pytest.mark.slow
def test_two_processes_train_adapters_and_several_tasks_and_nearly_what_one_does_in_larger_batches(
    recipe: Path, run: Run, tmp_path: Path
) -> None:
    lora = ["--lora", "--rank", 4, "--lora-dropout", 0]
    one_task = ["finetune", recipe, "--task", "even", *SHORT]
    two_tasks = ["finetune", recipe, "--task", "tints", "--task", "shades"]
    validated = [*two_tasks, *SHORT, "--validate-every", 3]
    out, err = torchrun(
        2,
        [
            [*one_task, "--batch-size", 4, "--trace", "two.csv", "-o", "two.safetensors"],
            [*one_task, "--batch-size", 4, *lora, "-o", "two"],
            [*validated, "--batch-size", 4, "--tensorboard", "events", "--trace", "both.csv", "-o", "both.safetensors"],
            [*two_tasks, "--steps", 5, "--learning-rate", "1e30", "-o", "lost"],
        ],
        tmp_path,
    )  # fmt: skip
    assert out == ["two.safetensors", "two", "both.safetensors", "[0, 0, 0, 3]"]
    lines = [line for line in err if line.startswith(("error:", "hint:"))]
    assert lines[0].startswith("error: lost: the loss of `")
    assert lines[1:] == ["hint: lower `learning_rate` (it is 1e+30); nothing was learned yet"]
    in_pieces = ["--batch-size", 4, "--accumulate", 2]
    for command in (
        [*one_task, *in_pieces, "--trace", "one.csv", "-o", "one.safetensors"],
        [*one_task, *in_pieces, *lora, "-o", "one"],
        [*one_task, "--batch-size", 8, "--trace", "large.csv", "-o", "large.safetensors"],
        [*validated, "--batch-size", 8, "--trace", "large both.csv", "-o", "large both.safetensors"],
    ):
        ended = run(*command)
        assert ended.status == 0, ended.err
    for name in ("{}.safetensors", "{}/adapter_model.safetensors"):
        assert_same(*(load_file(tmp_path / name.format(count)) for count in ("two", "one")))
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    # means of four and of eight round otherwise; where a gradient vanishes Adam makes a step of 1e-3 of it
    assert share_apart(tmp_path / "two.safetensors", tmp_path / "large.safetensors", 2e-6) < 0.02
    for row, other in zip(losses(tmp_path / "two.csv"), losses(tmp_path / "large.csv"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for row, other in zip(losses(tmp_path / "both.csv"), losses(tmp_path / "large both.csv"), strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    assert len(list((tmp_path / "events").iterdir())) == 1


STOPPED = f"""
import os
from mergecli.training import loop
update = loop.Training._update
def stop(self, losses):
    if self.state.step == 4:
        os.kill(os.getpid(), {int(signal.SIGINT)})
        loop.Training._update = update
    update(self, losses)
loop.Training._update = stop
"""
"""The first training gets a SIGINT in the middle of its fifth step."""


@pytest.mark.slow
def test_several_processes_go_on_where_they_were_stopped_with_dropout(recipe: Path, tmp_path: Path) -> None:
    train = [
        "finetune",
        recipe,
        "--task",
        "tints",
        "--batch-size",
        4,
        *SHORT,
        "--lora",
        "--rank",
        4,
        "--validate-every",
        3,
    ]
    stopped, never = ["-o", tmp_path / "stopped"], ["-o", tmp_path / "never"]
    out, err = torchrun(
        2,
        [[*train, *stopped], [*train, "--seed", 4, *stopped], [*train, *stopped], [*train, *never]],
        tmp_path,
        before=STOPPED,
    )
    state = tmp_path / ".stopped.resume.safetensors"
    assert out == [str(tmp_path / "stopped"), str(tmp_path / "never"), "[130, 2, 0, 0]"]
    assert err.count(f"interrupted: 5 of 8 steps are kept in {state}; the same command goes on") == 1
    refusal = f"error: {state}: is the state of a training with other settings, base or images:"
    assert err[err.index(refusal) + 1] == "  `seed`: 3 -> 4"
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("stopped", "never")]
    assert files[0].read_bytes() == files[1].read_bytes()


WHO_WRITES = """
import os, sys
from mergecli.merging.learning import probe
write = probe.StatisticsRun.write
def name(self, path, subjects, *more):
    print("wrote", os.environ["RANK"], *(each.name for each in subjects), file=sys.stderr, flush=True)
    write(self, path, subjects, *more)
probe.StatisticsRun.write = name
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "wrote"),
    [("fisher", ["wrote 0 a", "wrote 0 c", "wrote 1 b"]), ("reg_mean_plus_plus", ["wrote 0 a b c"])],
)
def test_a_merge_waits_for_what_the_processes_measure(
    zoo: Path, run: Run, tmp_path: Path, method: str, wrote: list[str]
) -> None:
    command = ["merge", zoo, "--method", method, *FEW, "-o"]
    out, err = torchrun(2, [[*command, "two.safetensors"]], tmp_path, before=WHO_WRITES)
    assert out == ["two.safetensors", "[0]"]
    assert sorted(line for line in err if line.startswith("wrote")) == wrote
    assert run(*command, "one.safetensors").status == 0
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_more_processes_than_tasks_go_on_from_the_state_of_one(
    world: AdaptedWorld, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergecli.merging.learning import adaptation_loop

    add = adaptation_loop.LoopState.add

    def stop(self: adaptation_loop.LoopState, *given: object) -> None:
        add(self, *given)
        if self.step == 5:
            raise KeyboardInterrupt

    home = tmp_path / "home of several"
    command = merge(world, "merged", "ada_merging", "steps=8")
    with monkeypatch.context() as patch:
        patch.setattr(adaptation_loop.LoopState, "add", stop)
        assert run(*command, MERGECLI_HOME=home).status == 130
    assert len(list(home.rglob("*.partial.safetensors"))) == 1
    torchrun(4, [command], tmp_path)
    assert len(load_file(tmp_path / "merged.learned.safetensors")["trace.entropies"]) == 8


@pytest.mark.slow
def test_two_processes_learn_masks_as_one_does(world: AdaptedWorld, run: Run, tmp_path: Path) -> None:
    settings = ("concrete_ada_merging", "steps=2", "mask_steps=2")
    torchrun(2, [merge(world, "two", *settings)], tmp_path)
    assert run(*merge(world, "one", *settings)).status == 0
    expect_the_same_learned(world, *(tmp_path / f"{name}.learned.safetensors" for name in ("one", "two")))


EVERY_OTHER = {
    "sy_merge": ["steps=2"],
    "fw_merging": ["steps=3", "granularity=layer", "learning_rate=0.5"],
    "ada_rank": ["steps=2", "objective=experts"],
    "doge_ada_merging": ["steps=2", "correction_steps=3"],
    "pwe_moe": ["steps=2"],
    "rank_one_moe": ["steps=2", "rank=2"],
}
"""Method that adapts -> settings."""


@pytest.mark.slow
def test_two_processes_learn_heads_ranks_steps_and_routers_as_one_does(
    world: AdaptedWorld, run: Run, tmp_path: Path
) -> None:
    out, err = torchrun(
        2, [merge(world, f"two.{name}", name, *more) for name, more in EVERY_OTHER.items()], tmp_path
    )
    assert out == [*(f"two.{name}.safetensors" for name in EVERY_OTHER), str([0] * len(EVERY_OTHER))], err
    for name, more in EVERY_OTHER.items():
        assert run(*merge(world, f"one.{name}", name, *more)).status == 0
        one, two = (tmp_path / f"{count}.{name}.learned.safetensors" for count in ("one", "two"))
        # where a gradient is nothing but rounding, Adam makes a whole step of it
        assert share_apart(one, two, 1e-5) < 0.05, name
        want, got = load_file(one), load_file(two)
        assert (got["trace.entropies"] - want["trace.entropies"]).abs().max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"),
    [("fisher", "statistics"), ("ada_merging", "coefficients"), ("representation_surgery", "coefficients")],
)
def test_what_was_damaged_in_the_store_is_made_again_by_all(
    world: AdaptedWorld, run: Run, tmp_path: Path, method: str, kind: str
) -> None:
    assert run("merge", world.recipe, "--method", "average", "-o", "average.safetensors").status == 0
    of = {
        "fisher": FEW,
        "ada_merging": [*LEARN, "--set", "method.steps=2"],
        "representation_surgery": [
            "--set",
            "method.merged=average.safetensors",
            "--set",
            "method.rank=4",
            "--set",
            "method.steps=2",
        ],
    }
    command = ["merge", world.recipe, "--method", method, *of[method], "-o"]
    torchrun(2, [[*command, "first.safetensors"]], tmp_path)
    damaged = [
        file
        for file in (tmp_path / "home of several" / kind).rglob("*.safetensors")
        if file.parent.name != "tasks"
    ]
    for file in damaged:
        flip(file, 8 * file.stat().st_size - 3)
    out, err = torchrun(2, [[*command, "again.safetensors"]], tmp_path)
    assert out == ["again.safetensors", "[0]"], err
    said = [line for line in err if "is damaged" in line]
    assert sorted(line.split(": ")[1] for line in said) == sorted(map(str, damaged))
    assert all(line.startswith("warning: ") and line.endswith("; it is made again") for line in said)
    first, again = (tmp_path / f"{name}.safetensors" for name in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()
