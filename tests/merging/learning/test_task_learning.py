"""Representation surgery on a tiny CLIP: learned, kept, found again, applied, refused; and what the result counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergecli import evaluate
from mergecli.formats.mixture import mixture_of
from mergecli.merging.merge import Merged, merge
from mergecli.methods.representation_surgery import DOWN, UP
from mergecli.runtime.errors import InputError, MergecliError, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from tests.support.image_zoo import CLASSES, Zoo, make_zoo
from tests.support.kept_files import save_checked

pytestmark = pytest.mark.usefixtures("own_store")

SHORT: dict[str, Any] = {"steps": 12, "batch_size": 5, "rank": 3, "learning_rate": 1e-2}
VISION = "vision_model."
D = 8
"""Numbers of an image's features."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    made = make_zoo(tmp_path_factory.mktemp("surgery"))
    merge(made.folder / "zoo.toml", method="task_arithmetic", output=made.folder / "merged.safetensors")
    return made


def operate(zoo: Zoo, output: Path, **more: Any) -> Merged:
    known = ("progress", "coefficients", "save_coefficients", "trace", "plot", "changes", "recipe")
    given = {key: more.pop(key) for key in known if key in more}
    settings = {"merged": str(zoo.folder / "merged.safetensors"), **SHORT, **more}
    recipe = given.pop("recipe", zoo.folder / "zoo.toml")
    return merge(recipe, method="representation_surgery", settings=settings, output=output, **given)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stored:
        return stored.metadata()


@pytest.mark.parametrize("steps", [0, 12])
def test_without_steps_the_result_counts_what_the_merged_tower_counts(
    zoo: Zoo, tmp_path: Path, steps: int
) -> None:
    operate(zoo, tmp_path / "s.safetensors", steps=steps, learning_rate=0.3)
    files = [tmp_path / "s.safetensors", zoo.folder / "merged.safetensors"]
    one, other = (evaluate(each, recipe=zoo.folder / "zoo.toml", tasks=list(CLASSES))[0] for each in files)
    losses, counts = (
        [[getattr(score, what) for score in each.tasks.values()] for each in (one, other)]
        for what in ("loss", "correct")
    )
    assert (losses[0] == losses[1]) == (steps == 0)
    assert steps or counts[0] == counts[1]


def test_the_trace_tells_a_loss_that_falls(zoo: Zoo, tmp_path: Path) -> None:
    operate(zoo, tmp_path / "s.safetensors", split="train", steps=300, trace=tmp_path / "t.csv")
    head, *rows = (tmp_path / "t.csv").read_text().splitlines()
    assert head == "step,loss,loss a,loss b,loss c"
    assert [row.split(",")[0] for row in rows] == [str(step) for step in range(1, 301)]
    losses = torch.tensor([[float(value) for value in row.split(",")[1:]] for row in rows])
    torch.testing.assert_close(losses[:, 0], losses[:, 1:].mean(1), rtol=1e-4, atol=0)
    assert (losses[-30:].mean(0) < losses[:30].mean(0)).all()


def test_what_was_learned_is_applied_without_images_to_the_same_bytes(zoo: Zoo, tmp_path: Path) -> None:
    operate(zoo, tmp_path / "s.safetensors", save_coefficients=tmp_path / "c.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (*CLASSES, "merged"):
        shutil.copy(zoo.folder / f"{name}.safetensors", bare)
    save_file(dict(zoo.base), bare / "clip.safetensors")
    text = (
        (zoo.folder / "zoo.toml").read_text().partition("[tasks")[0].replace('"clip"', '"clip.safetensors"')
    )
    (bare / "recipe.toml").write_text(text)
    given = {"merged": str(bare / "merged.safetensors")}
    merge(
        bare / "recipe.toml", method="representation_surgery", settings=given, output=bare / "s.safetensors",
        coefficients=tmp_path / "c.safetensors",
    )  # fmt: skip
    want, got = load_file(tmp_path / "s.safetensors"), load_file(bare / "s.safetensors")
    assert all(got[name].equal(value) for name, value in want.items())
    operate(zoo, bare / "again.safetensors", coefficients=tmp_path / "c.safetensors")
    assert (bare / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_it_is_found_again_by_content_and_the_same_bytes_are_learned_anew(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def tell(text: str, *_: int) -> None:
        told.append(text)

    operate(zoo, tmp_path / "s.safetensors")
    shutil.copy(zoo.folder / "merged.safetensors", tmp_path / "merged.safetensors")
    operate(zoo, tmp_path / "t.safetensors", progress=tell, merged=str(tmp_path / "merged.safetensors"))
    assert [text for text in told if "features" in text] == []
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    operate(zoo, tmp_path / "u.safetensors")
    want = (tmp_path / "s.safetensors").read_bytes()
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "u.safetensors").read_bytes() == want
    operate(zoo, tmp_path / "v.safetensors", changes=["seed=1"])
    assert not load_file(tmp_path / "v.safetensors")[UP].equal(load_file(tmp_path / "s.safetensors")[UP])


def test_an_interrupted_run_goes_on_with_the_next_task(zoo: Zoo, tmp_path: Path) -> None:
    def stop(text: str, *_: int) -> None:
        if text.startswith("b:"):
            raise KeyboardInterrupt

    def tell(text: str, *_: int) -> None:
        told.add(text[:2])

    told: set[str] = set()
    with pytest.raises(KeyboardInterrupt):
        operate(zoo, tmp_path / "s.safetensors", progress=stop)
    operate(zoo, tmp_path / "s.safetensors", progress=tell)
    assert {text for text in told if text[1] == ":"} == {"b:", "c:"}


def test_the_order_of_tasks_changes_nothing_of_what_a_task_learns(zoo: Zoo, tmp_path: Path) -> None:
    head, _, rest = (zoo.folder / "zoo.toml").read_text().partition("[tuned]\n")
    lines = rest.split("\n")
    (zoo.folder / "turned.toml").write_text(head + "[tuned]\n" + "\n".join([*lines[2::-1], *lines[3:]]))
    operate(zoo, tmp_path / "s.safetensors")
    operate(zoo, tmp_path / "t.safetensors", recipe=zoo.folder / "turned.toml")
    one, other = load_file(tmp_path / "s.safetensors"), load_file(tmp_path / "t.safetensors")
    assert one[UP].equal(other[UP].flip(0))
    assert one[DOWN].equal(other[DOWN].flip(0))


def test_the_file_says_what_it_is_made_of_and_shows_no_machine(zoo: Zoo, tmp_path: Path) -> None:
    operate(zoo, tmp_path / "s.safetensors", split="validation", images=2)
    about = metadata(tmp_path / "s.safetensors")
    looked = json.loads(about["adapted_on"])
    assert [(each["split"], each["images"]) for each in looked.values()] == [("validation", 2)] * 3
    with open_checkpoint(zoo.folder / "merged.safetensors") as merged:
        assert json.loads(about["inputs"])["merged tower"] == merged.digest()
    assert 'merged = "merged.safetensors"' in about["recipe"]
    assert str(zoo.folder) not in json.dumps(about)


def test_a_tasks_tower_is_the_merged_one(zoo: Zoo, tmp_path: Path) -> None:
    operate(zoo, tmp_path / "s.safetensors", steps=1)
    want = load_file(zoo.folder / "merged.safetensors")
    with open_checkpoint(tmp_path / "s.safetensors") as stored:
        tower = mixture_of(stored).of_task("b")
        assert set(tower.entries) == set(want)
        assert all(tower.read(name).equal(value) for name, value in want.items())


def test_a_tasks_tower_without_its_correction_is_not_evaluated(zoo: Zoo, tmp_path: Path) -> None:
    operate(zoo, tmp_path / "s.safetensors", steps=1)
    with pytest.raises(InputError, match="is a tower without the correction of its features") as raised:
        evaluate(f"{tmp_path}/s.safetensors#b", recipe=zoo.folder / "zoo.toml", tasks=["b"])
    assert raised.value.hint == "evaluate the whole file, on this task with `--task`"


def test_the_size_of_features_may_be_left_to_be_found(zoo: Zoo, tmp_path: Path) -> None:
    operate(zoo, tmp_path / "s.safetensors", steps=1)
    operate(zoo, tmp_path / "z.safetensors", steps=1, feature_size=0)
    assert (tmp_path / "z.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def changed(file: Path, **tensors: Any) -> None:
    """Replaces tensors of a file (None removes), and keeps its metadata; `metadata` changes that."""
    about = {**metadata(file), **tensors.pop("metadata", {})}
    kept = {name: value for name, value in {**load_file(file), **tensors}.items() if value is not None}
    save_checked(kept, file, {key: value for key, value in about.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: torch.zeros(3, D, 4)}, r"`surgery.up` has shape \(3, 8, 4\), expected \(3, 8, 3\)"),
        ({UP: torch.zeros(2, D, 3)}, r"`surgery.up` has shape \(2, 8, 3\)"),
        ({DOWN: torch.zeros(3, 3, 9)}, r"`surgery.down` has shape \(3, 3, 9\)"),
        ({DOWN: torch.zeros(3, 3, D).half()}, r"`surgery.down` has dtype F16, expected F32"),
        ({DOWN: None}, r"lacks tensor `surgery.down`"),
        ({"surgery.more": torch.zeros(1)}, r"has an extra tensor `surgery.more`"),
    ],
)
def test_a_result_that_is_not_what_it_says_is_refused(
    zoo: Zoo, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    operate(zoo, tmp_path / "s.safetensors", steps=1)
    changed(tmp_path / "s.safetensors", **change)
    with open_checkpoint(tmp_path / "s.safetensors") as stored, pytest.raises(InputError, match=message):
        mixture_of(stored)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({UP: torch.zeros(3, D, 4)}, r"`surgery.up` has shape \(3, 8, 4\), expected \(3, 8, 3\)"),
    ({DOWN: None}, "lacks tensor `surgery.down`"),
    ({UP: torch.full((3, D, 3), torch.nan)}, "`surgery.up` has NaN or infinity"),
    ({"trace.losses": torch.zeros(2, 3)}, r"`trace.losses` has shape \(2, 3\), expected \(1, 3\)"),
    ({UP: torch.zeros(3, D, 3).half()}, "`surgery.up` has dtype F16, expected F32"),
    ({"metadata": {"kind": None}}, "holds no coefficients"),
    ({"metadata": {"method": "ada_merging"}}, "was learned by `ada_merging`"),
    ({"metadata": {"tasks": "[[[["}}, "does not say what it was learned on"),
    ({"metadata": {"adapted_on": None}}, "does not say what it was learned on"),
    ({"metadata": {"settings_table": '{"steps": "many"}'}}, "steps"),
    ({"metadata": {"tasks": '["b", "a", "c"]'}}, "is for the models `b`, `a`, `c`, in this order"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_file_of_what_was_learned_that_does_not_fit_is_refused(
    zoo: Zoo, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file, output = tmp_path / "c.safetensors", tmp_path / "s.safetensors"
    operate(zoo, output, steps=1, save_coefficients=file)
    output.unlink()
    changed(file, **change)
    with pytest.raises(MergecliError, match=message):
        merge(
            zoo.folder / "zoo.toml", method="representation_surgery", output=output, coefficients=file,
            settings={"merged": str(zoo.folder / "merged.safetensors")},
        )  # fmt: skip
    assert not output.exists()


def test_another_setting_is_refused_and_another_tower_is_warned_of(zoo: Zoo, tmp_path: Path) -> None:
    file, output = tmp_path / "c.safetensors", tmp_path / "s.safetensors"
    assert operate(zoo, output, save_coefficients=file).warnings == ()
    with pytest.raises(UsageError, match=r"was learned with `steps = 12`, the recipe says `2`"):
        operate(zoo, output, steps=2, coefficients=file)
    merge(zoo.folder / "zoo.toml", method="average", output=tmp_path / "average.safetensors")
    other = operate(zoo, output, coefficients=file, merged=str(tmp_path / "average.safetensors"))
    assert other.warnings == (f"{file}: was learned on other weights of `merged tower`",)


def test_a_tower_merged_from_other_models_is_warned_of(zoo: Zoo, tmp_path: Path) -> None:
    file = zoo.folder / "a.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(file).items()}, tmp_path / "a.safetensors")
    text = (zoo.folder / "zoo.toml").read_text().replace("a.safetensors", str(tmp_path / "a.safetensors"))
    (zoo.folder / "other.toml").write_text(text)
    done = operate(zoo, tmp_path / "s.safetensors", recipe=zoo.folder / "other.toml")
    assert done.warnings == (f"{zoo.folder / 'merged.safetensors'}: was merged from other weights of `a`",)


def test_without_a_merged_tower_it_says_how_to_make_one(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no merged tower is named") as error:
        merge(zoo.folder / "zoo.toml", method="representation_surgery", output=tmp_path / "s.safetensors")
    assert "--set method.merged=ada.safetensors" in error.value.hint


def test_a_merged_tower_that_is_none_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    output, wrong = tmp_path / "s.safetensors", tmp_path / "wrong.safetensors"
    with pytest.raises(InputError, match="no such file"):
        operate(zoo, output, merged=str(tmp_path / "none.safetensors"))
    with pytest.raises(InputError, match="is a task vector, a merged tower was expected"):
        operate(zoo, output, merged=str(zoo.folder / "b.safetensors"))
    operate(zoo, wrong, steps=1)
    with pytest.raises(InputError, match=r"`method.merged`: expected one plain tower, got towers of several"):
        operate(zoo, output, merged=str(wrong))
    routed = tmp_path / "routed.safetensors"
    merge(zoo.folder / "zoo.toml", method="smile", output=routed)
    with pytest.raises(InputError, match=r"`method.merged`: expected one plain tower, got one that routes"):
        operate(zoo, output, merged=str(routed))
    operate(zoo, output, steps=1, merged=f"{wrong}#a")
    output.unlink()
    tower = load_file(zoo.folder / "merged.safetensors")
    bias = f"{VISION}post_layernorm.bias"
    save_file({**tower, bias: torch.zeros(17)}, wrong)
    with pytest.raises(
        InputError, match=r"merged tower: `vision_model.post_layernorm.bias` has shape \(17,\)"
    ):
        operate(zoo, output, merged=str(wrong))
    save_file({**tower, bias: torch.full((16,), torch.nan)}, wrong)
    with pytest.raises(InputError, match="gives features of a that are NaN or infinity"):
        operate(zoo, output, merged=str(wrong))
    with pytest.raises(InputError, match=r"`vision_model.post_layernorm.bias` has NaN or infinity"):
        operate(zoo, output, merged=str(wrong), steps=0)
    assert not output.exists()


def test_wrong_calls_are_refused_and_the_merged_tower_is_never_replaced(zoo: Zoo, tmp_path: Path) -> None:
    merged = shutil.copy(zoo.folder / "merged.safetensors", tmp_path)
    before = Path(merged).read_bytes()
    with pytest.raises(UsageError, match=r"would replace an input \(merged tower\)"):
        operate(zoo, Path(merged), merged=merged)
    assert Path(merged).read_bytes() == before
    with pytest.raises(UsageError, match="there is no picture of what"):
        operate(zoo, tmp_path / "s.safetensors", plot=tmp_path / "t.png")
    with pytest.raises(UsageError, match=r"`method.feature_size`: is 9, the base's features have 8"):
        operate(zoo, tmp_path / "s.safetensors", feature_size=9)
    with pytest.raises(MergecliError, match="has no split `dev`"):
        operate(zoo, tmp_path / "s.safetensors", changes=["tasks.b.split=dev"])
