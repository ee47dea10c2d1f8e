"""Training on several tasks, in pieces, and with validations."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.clip.heads import logits, zero_shot_head
from mergecli.clip.model import Clip, load_clip
from mergecli.data.images import load_images
from mergecli.data.tasks import TaskTable, find
from mergecli.evaluation.evaluate import evaluate
from mergecli.recipe.schema import Recipe
from mergecli.runtime.distributed import Ranks
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from mergecli.training.data import TrainingTask
from mergecli.training.finetune import finetune
from mergecli.training.loop import Training
from mergecli.training.resume import TrainingState
from mergecli.training.settings import Settings
from tests.support.processor import pixel_values
from tests.support.tiny_clip import make_image_task, make_tiny_clip

pytestmark = pytest.mark.usefixtures("own_store")

ROUNDING = 2e-6
"""After ten of Adam's steps of 1e-3: gradients that are summed in another order differ in their last digits, which counts
where a gradient is next to nothing."""

SHORT: dict[str, Any] = {"steps": 10, "batch_size": 6, "learning_rate": 1e-3, "seed": 3}
BOTH = ("tints", "shades")


def make_tasks(folder: Path) -> Recipe:
    """A tiny base with two tasks, of 30 and 20 images for training."""
    base = parse_source(str(make_tiny_clip(folder / "base", seed=1)), Path())
    tints = make_image_task(folder / "tints")
    shades = make_image_task(folder / "shades", classes=("dark", "bright"), train=20, seed=4)
    return Recipe(
        base=base,
        tasks={
            name: TaskTable(data=parse_source(str(data), Path()), templates=("something {}",))
            for name, data in (("tints", tints), ("shades", shades))
        },
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tasks(tmp_path_factory.mktemp("training"))


class ByHand:
    """A task as plain torch has it: all pixels, labels, the head, and the order of the batches."""

    def __init__(self, clip: Clip, recipe: Recipe, name: str, split: str = "train") -> None:
        task = find(name, recipe)
        images = load_images(task, split)
        self.clip = clip
        self.head = zero_shot_head(clip, images.classes or (), task.templates)
        self.pixels = pixel_values(clip, [image for image, _ in images])
        self.labels = torch.tensor(images.labels)

    def batches(self, size: int, seed: int, steps: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        count = len(self.labels)
        return [
            rows for _ in range(steps) for rows in torch.randperm(count, generator=generator).split(size)
        ][:steps]

    def loss(self, rows: Tensor) -> Tensor:
        found = logits(self.clip, self.head, self.pixels[rows])
        return torch.nn.functional.cross_entropy(found, self.labels[rows])


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = ROUNDING) -> None:
    for name, tensor in want.items():
        if not name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which Adam blows up
            assert (got[name] - tensor).abs().max() <= tolerance, name


def stopping(after: int) -> Callable[[str, int, int], None]:
    """A `progress` that interrupts at that step."""

    def progress(description: str, done: int, total: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    return progress


def test_several_tasks_are_learned_with_the_sum_of_their_losses(recipe: Recipe, tmp_path: Path) -> None:
    done = finetune(recipe, task=BOTH, output=tmp_path / "t.safetensors", trace=tmp_path / "t.csv", **SHORT)
    assert recipe.base is not None
    clip = load_clip(recipe.base.path or Path())
    tasks = [ByHand(clip, recipe, name) for name in BOTH]
    clip.tower.requires_grad_(True)
    optimizer = torch.optim.Adam(clip.tower.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    losses: list[list[float]] = []
    for rows in zip(*(task.batches(6, 3, 10) for task in tasks), strict=True):
        each = [task.loss(own) for task, own in zip(tasks, rows, strict=True)]
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        schedule.step()
        losses.append([float(loss.detach()) for loss in each])
    want = {f"vision_model.{name}": tensor for name, tensor in clip.tower.state_dict().items()}
    assert_near(load_file(tmp_path / "t.safetensors"), want)
    assert done.loss == pytest.approx(sum(map(sum, losses)) / 10, rel=1e-5)
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    for row, (tints, shades) in zip(rows, losses, strict=True):
        assert float(row["loss tints"]) == pytest.approx(tints, rel=1e-4)
        assert float(row["loss shades"]) == pytest.approx(shades, rel=1e-4)
        assert float(row["loss"]) == pytest.approx(tints + shades, rel=1e-4)
    assert float(rows[0]["learning_rate"]) == 1e-3
    with open_checkpoint(tmp_path / "t.safetensors") as stored:
        assert stored.metadata["task"] == "tints, shades"
        assert list(json.loads(stored.metadata["settings"])["tasks"]) == ["tints", "shades"]


def test_accumulated_batches_are_one_larger_batch(recipe: Recipe, tmp_path: Path) -> None:
    whole = {**SHORT, "batch_size": 12}
    finetune(recipe, task=BOTH, output=tmp_path / "whole.safetensors", **whole)
    finetune(
        recipe, task=BOTH, output=tmp_path / "parts.safetensors", accumulate=4, **{**SHORT, "batch_size": 3}
    )
    assert_near(load_file(tmp_path / "parts.safetensors"), load_file(tmp_path / "whole.safetensors"))


def test_bfloat16_computes_otherwise_and_float32_weights_are_trained(recipe: Recipe, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        finetune(
            recipe, task="tints", output=tmp_path / f"{precision}.safetensors", precision=precision, **SHORT
        )
    exact, rough = (load_file(tmp_path / f"{each}.safetensors") for each in ("float32", "bfloat16"))
    difference = max(float((exact[name] - rough[name]).abs().max()) for name in exact)
    assert 1e-5 < difference < 2 * 10 * 1e-3  # Adam goes no further than its learning rate a step
    assert {tensor.dtype for tensor in rough.values()} == {torch.float32}
    weight = rough["vision_model.post_layernorm.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_scaled_gradients_are_the_same_training_and_go_on_from_a_state(
    recipe: Recipe, tmp_path: Path
) -> None:
    """What float16 does on a GPU, on a CPU, where the scaler works too."""
    settings = Settings(6, 1e-3, 6, 0.0, "constant", 3, "float32", precision="float16")
    assert recipe.base is not None

    def trained(file: Path, *runs: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        for until in runs:
            clip = load_clip(recipe.base.path)  # pyright: ignore
            task = TrainingTask.of(find("tints", recipe), False, None).prepare(clip, "", 100)
            clip.tower.requires_grad_(True)
            state = TrainingState(file, dict(clip.tower.named_parameters()), settings.as_metadata, 1, Ranks())

            def stop(loss: float, images: int, state: TrainingState = state, until: int = until) -> None:
                if state.step == until and until < 6:
                    raise KeyboardInterrupt

            try:
                Training(clip, [task], state, settings, Ranks()).run(100, stop, state.save)
            except KeyboardInterrupt:
                assert until < 6
        return clip.tower.state_dict(), state._counters()

    once, facts = trained(tmp_path / "a", 6)
    twice, again = trained(tmp_path / "b", 1, 4, 6)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert facts == again
    assert facts["updates"] < facts["step"] == 6  # the first scale is too large, and is halved
    assert facts["scale"] < 2**16


def best_of(rows: Sequence[float]) -> int:
    return max(range(len(rows)), key=lambda place: (rows[place], -place))


def test_the_best_step_is_written_and_the_tenth_it_is_told_by_is_not_trained_on(
    recipe: Recipe, tmp_path: Path
) -> None:
    done = finetune(
        recipe, task=BOTH, output=tmp_path / "best.safetensors", validate_every=2, trace=tmp_path / "t.csv",
        **{**SHORT, "learning_rate": 2e-2, "steps": 9},
    )  # fmt: skip
    assert list(done.validation) == [2, 4, 6, 8, 9]
    means = {step: sum(found.values()) / 2 for step, found in done.validation.items()}
    assert done.best_step == list(means)[best_of(list(means.values()))]
    assert done.best_step < 9, "a learning rate at which the last step is not the best was chosen"
    (told,) = evaluate(tmp_path / "best.safetensors", recipe=recipe, tasks=BOTH, split="validation")
    assert {name: task.accuracy for name, task in told.tasks.items()} == done.validation[done.best_step]
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["accuracy"]] == [2, 4, 6, 8, 9]
    with open_checkpoint(tmp_path / "best.safetensors") as stored:
        about = json.loads(stored.metadata["settings"])["tasks"]["tints"]
        assert stored.metadata["best_step"] == str(done.best_step)
    assert about["split"] == "train-without-validation"
    assert (about["validation"]["split"], about["validation"]["images"]) == ("validation", 3)
    assert about["validation"]["held_out"] == "a tenth of split `train`"


def test_a_named_split_is_validated_on_and_all_training_images_are_used(
    recipe: Recipe, tmp_path: Path
) -> None:
    plain = finetune(recipe, task="tints", output=tmp_path / "plain.safetensors", **SHORT)
    done = finetune(
        recipe, task="tints", output=tmp_path / "t.safetensors", validate_every=10, validation_split="test",
        **SHORT,
    )  # fmt: skip
    (told,) = evaluate(tmp_path / "t.safetensors", recipe=recipe, tasks=["tints"])
    assert done.validation == {10: {"tints": told.tasks["tints"].accuracy}}
    assert (plain.best_step, plain.validation) == (10, {})
    got, want = load_file(tmp_path / "t.safetensors"), load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_task_of_several_whose_loss_is_no_number_is_named(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t: the loss of `(tints|shades)` is (nan|inf) at step 2") as caught:
        finetune(recipe, task=BOTH, output=tmp_path / "t", save_every=1, **{**SHORT, "learning_rate": 1e30})
    assert caught.value.hint == "lower `learning_rate` (it is 1e+30); nothing was learned yet"
    assert not (tmp_path / "t").exists()


def test_data_that_do_not_fit_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    few = Recipe(base=recipe.base, tasks={"tints": TaskTable(
        data=recipe.tasks["tints"].data, templates=("a {}",), classes=("red", "green"))})  # fmt: skip
    with pytest.raises(InputError, match="the data have 3 classes, the task has 2"):
        finetune(few, task="tints", output=tmp_path / "t", steps=1)
    with pytest.raises(UsageError, match="has no split `dev`"):
        finetune(recipe, task="tints", output=tmp_path / "t", validate_every=1, validation_split="dev")
    five = make_image_task(tmp_path / "five", train=5)
    with pytest.raises(InputError, match="a tenth of 5 images is none"):
        finetune(recipe, task="tints", data=five, output=tmp_path / "t", validate_every=1)
    with pytest.raises(UsageError, match="`data`: is for a single task"):
        finetune(recipe, task=BOTH, data=five, output=tmp_path / "t")
    other = make_image_task(tmp_path / "other", classes=("a", "b", "c"))
    (other / "train-00000-of-00001.parquet").replace(tmp_path / "five" / "dev-00000-of-00001.parquet")
    with pytest.raises(InputError, match="split `dev`: its classes are not those of split `train`"):
        finetune(recipe, task="tints", data=tmp_path / "five", output=tmp_path / "t", validate_every=1)
    with pytest.raises(UsageError, match="no task to train on"):
        finetune(recipe, task=[], output=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_wrong_settings_of_every_kind_are_listed_together(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        finetune(
            recipe, task="tints", output=tmp_path / "t", accumulate=0, precision="float16", validate_every=-1,
            lora=True, rank=0, alpha=0, lora_dropout=1, target_modules="q_proj,",
        )  # fmt: skip
    assert caught.value.message.splitlines()[1:] == [
        "  `accumulate`: expected a whole number, at least 1, got 0",
        "  `validate_every`: expected a whole number, at least 0, got -1",
        "  `precision`: float16 needs a GPU, and the device is `cpu`; bfloat16 does not",
        "  `rank`: expected a whole number, at least 1, got 0",
        "  `alpha`: expected a number above 0, got 0",
        "  `lora_dropout`: expected a number in [0, 1), got 1",
        "  `target_modules`: expected names of linear layers, such as q_proj",
    ]
    with pytest.raises(UsageError, match="`validation_split`: there is no validation"):
        finetune(recipe, task="tints", output=tmp_path / "t", validation_split="test")
    with pytest.raises(UsageError, match=r"expected a `\.safetensors` file, or a folder's name"):
        finetune(recipe, task="tints", output=tmp_path / "t.bin")
    with pytest.raises(UsageError, match=r"expected a \.csv file"):
        finetune(recipe, task="tints", output=tmp_path / "t", trace=tmp_path / "t.txt")
