"""SyMerge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.evaluation.evaluate import evaluate
from mergecli.formats.mixture import mixture_of
from mergecli.merging.learning.objective import TowerObjective
from mergecli.merging.merge import merge
from mergecli.methods._adapted import expert_loss
from mergecli.methods._base import uniform
from mergecli.methods.sy_merge import BIAS, WEIGHT
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from tests.conftest import Weights, assert_same
from tests.methods.reference.sy_merge import imitation, kept, sy_merge
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.adapted_world import CLASSES, TEMPLATE, VISION, AdaptedWorld, make_adapted_world
from tests.support.exact_clip import SEED, ExactClip
from tests.support.learned_merge import learned

pytestmark = pytest.mark.usefixtures("own_store")
TASKS = list(CLASSES)


def order(number: int) -> list[int]:
    """The tasks of a round, as the product draws them."""
    return uniform(SEED, "order of tasks", f"round {number}", 0, 3).argsort(stable=True).tolist()


def unit_features(clip: ExactClip, weights: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    own = {name.removeprefix(VISION): value for name, value in weights.items()}
    pooled = torch.func.functional_call(clip.model.vision_model, own, (pixels,)).pooler_output
    image = clip.model.visual_projection(pooled)
    return image / image.norm(dim=-1, keepdim=True)


def scaled_heads(clip: ExactClip) -> list[Tensor]:
    return [clip.model.logit_scale.exp().detach() * head.detach() for head in clip.heads]


def apart(file: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Each task's weights and biases."""
    sizes = [len(classes) for classes in CLASSES.values()]
    return list(file[WEIGHT].split(sizes)), list(file[BIAS].split(sizes))


@pytest.mark.parametrize("sum_tasks", [False, True])
def test_sy_merge_is_adam_through_the_merge_and_the_heads(
    clip: ExactClip, tmp_path: Path, sum_tasks: bool
) -> None:
    world, rate = clip.world, 1e-2
    tower, found = learned(
        world, tmp_path, "sy_merge", steps=4, learning_rate=rate, sum_tasks=sum_tasks, split="train"
    )
    merged, coefficients, weights, biases = sy_merge(
        lambda own, pixels: unit_features(clip, own, pixels), clip.batches(split="train"), scaled_heads(clip),
        world.base, world.tuned, order, steps=4, learning_rate=rate, sum_tasks=sum_tasks,
    )  # fmt: skip
    matter = [number for number, name in enumerate(world.base) if not name.endswith("k_proj.bias")]
    assert (found["coefficients"] - coefficients)[:, matter].abs().max() < 1e-3 * rate
    for place, (weight, bias) in enumerate(zip(*apart(tower), strict=True)):
        assert (weight - weights[place]).abs().max() < 2e-5, "float32 of weights near 100"
        assert (bias - biases[place]).abs().max() < 1e-3 * rate
        assert bias.abs().max() > rate / 2
    names = [list(world.base)[number] for number in matter]
    assert_same({name: tower[name].double() for name in names}, {name: merged[name] for name in names}, 2e-6)


def test_without_rounds_it_is_task_arithmetic_with_zero_shot_heads(clip: ExactClip, tmp_path: Path) -> None:
    world = clip.world
    tower, _ = learned(world, tmp_path, "sy_merge", steps=0)
    shared = {name: tower[name] for name in world.base}
    assert_same(shared, task_arithmetic(world.base, world.tuned, 0.3), 1e-6)
    for weight, bias, head in zip(*apart(tower), scaled_heads(clip), strict=True):
        torch.testing.assert_close(weight.double(), head, rtol=1e-5, atol=1e-5)
        assert not bias.any()
    merge(world.recipe, method="task_arithmetic", output=tmp_path / "ta.safetensors")
    both = evaluate([tmp_path / "m.safetensors", tmp_path / "ta.safetensors"], recipe=world.recipe)
    for task in TASKS:
        own, plain = (each.tasks[task] for each in both)
        assert own.correct == plain.correct
        assert own.loss == pytest.approx(plain.loss, abs=1e-4)


def test_labels_of_the_images_change_nothing(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    found: list[Weights] = []
    for name in ("as they are", "reversed"):
        world = make_adapted_world(tmp_path / name)
        if name == "reversed":
            for task in TASKS:
                file = world.folder / f"data-{task}" / "test-00000-of-00001.parquet"
                table = pq.read_table(file)
                place, column = table.schema.get_field_index("label"), table["label"].to_pylist()
                changed = table.set_column(place, table.schema.field("label"), [column[::-1]])
                pq.write_table(changed, file)
        found.append(learned(world, tmp_path, "sy_merge", steps=2)[1])
    one, other = found
    assert all(one[key].equal(other[key]) for key in one)


def test_only_images_on_which_the_merged_model_differs_and_is_surer_are_left_out() -> None:
    own = torch.tensor([[2.0, 1, 0], [1, 0.5, 0], [5, 0, 0]], dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([[0.3, 0, 0], [0, 3, 0], [0, 1, 0.9]], dtype=torch.float64)
    assert kept(own, expert) == [0, 1], (
        "agrees though surer; differs, the expert is surer; differs and is surer"
    )
    confidences, labels = expert.softmax(1).max(1)
    loss = expert_loss(own, labels, confidences)
    assert loss.item() == pytest.approx(imitation(own, expert).item())  # type: ignore[union-attr]
    loss.backward()
    assert own.grad is not None
    want = (own[:2].softmax(1) - torch.nn.functional.one_hot(labels[:2], 3)) / 2
    torch.testing.assert_close(own.grad[:2], want)
    assert not own.grad[2].any()


def test_a_model_that_is_its_expert_drops_no_image_and_is_pushed_to_its_own_classes() -> None:
    own = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kept(own, own) == list(range(50))
    logits = own.clone().requires_grad_()
    confidences, labels = own.softmax(1).max(1)
    expert_loss(logits, labels, confidences).backward()
    want = (own.softmax(1) - torch.nn.functional.one_hot(own.argmax(1), 4)) / 50
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, want)


def test_a_step_on_a_task_leaves_the_other_heads_as_they_are(
    clip: ExactClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = learned(clip.world, tmp_path, "sy_merge", steps=0)
    monkeypatch.setattr(TowerObjective, "order", lambda _, number: [1])
    after, _ = learned(clip.world, tmp_path, "sy_merge", steps=1)
    for old, new in zip(apart(before), apart(after), strict=True):
        assert [a.equal(b) for a, b in zip(old, new, strict=True)] == [True, False, True]


@pytest.fixture
def merged(clip: ExactClip, tmp_path: Path) -> Path:
    """A file whose heads differ much from zero-shot heads."""
    learned(clip.world, tmp_path, "sy_merge", steps=3, learning_rate=3.0, adapt_on=["one", "three"])
    return tmp_path / "m.safetensors"


def test_evaluation_uses_the_files_own_heads_and_says_so(clip: ExactClip, merged: Path) -> None:
    tower, world = load_file(merged), clip.world
    (result,) = evaluate([merged], recipe=world.recipe)
    assert result.checkpoint["heads"] == "learned"
    weights, biases = (list(tower[key].split([3, 4])) for key in (WEIGHT, BIAS))
    heads: dict[str, Any] = dict(zip(("one", "three"), zip(weights, biases, strict=True), strict=True))
    for place, task in enumerate(TASKS):
        features = unit_features(
            clip, {name: tower[name].double() for name in world.base}, clip.pixels["test"][task]
        )
        weight, bias = heads.get(task, (scaled_heads(clip)[place], torch.zeros(len(CLASSES[task]))))
        logits = features @ weight.double().T + bias.double()
        labels = torch.arange(len(logits)) % len(CLASSES[task])
        want = torch.nn.functional.cross_entropy(logits, labels).item()
        assert result.tasks[task].loss == pytest.approx(want, abs=1e-4), task


def test_other_prompts_or_class_names_than_a_heads_are_refused(clip: ExactClip, merged: Path) -> None:
    recipe = clip.world.folder / "other.toml"
    recipe.write_text(clip.world.recipe.read_text().replace(TEMPLATE, "a drawing of {}"))
    with pytest.raises(InputError) as caught:
        evaluate([merged], recipe=recipe, tasks="one")
    message = f"{merged}: its head for `one` was learned for other prompts than the task has now"
    assert caught.value.message == message
    assert evaluate([merged], recipe=recipe, tasks="two"), "whose head is the zero-shot head"
    with open_checkpoint(merged) as stored, pytest.raises(InputError, match="for other class names than"):
        mixture_of(stored).expect_classes("three", {"classes": "x", "templates": "y"})


def test_a_task_of_the_file_without_its_head_is_no_result(clip: ExactClip, merged: Path) -> None:
    with pytest.raises(InputError, match="is a tower without its own classification head"):
        evaluate([f"{merged}#one"], recipe=clip.world.recipe)


def test_sizes_of_heads_that_the_tasks_do_not_have_are_refused(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        learned(adapted_world, tmp_path, "sy_merge", steps=0, class_counts=[3, 2, 5])
    assert caught.value.message == "`method.class_counts`: is [3, 2, 5], the tasks have [3, 2, 4]"
