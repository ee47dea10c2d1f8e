from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mergecli.data import tasks
from mergecli.data.tasks import TaskTable
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError
from mergecli.storage.sources import Source, parse_source

# number of classes, of templates, and the digests of both, as published with the tables
PUBLISHED = """
sun397             397  2 dd1277b1cfcf09ba c97a3d1ad5819800
stanford-cars      196  8 93d089469409bbd0 255ecc632c41182c
resisc45            45 18 3c2177013901f0ef 8f390b8578e5c3bf
eurosat             10  3 ee2e41b9973e7206 9bc85d9f1798d03b
svhn                10  1 29dd21f55e4611d4 c0341e0a1fdfd8fb
gtsrb               43  3 953036bc5aedbe6b a6794061485dcfa2
mnist               10  1 29dd21f55e4611d4 c0341e0a1fdfd8fb
dtd                 47  8 681d23b9cd3c2ede 1f6888d2130f62a4
oxford_flowers102  102  1 f5a3bda044faf55b bfcd4bbb214d5015
pcam                 2  1 27352df7ede1fd87 7c7758b084ef77fa
fer2013              7  6 0fece1ddf1a3ebf7 ae805dccc6d01c6a
oxford-iiit-pet     37  1 8e35ab44db27d55a 16a0790f0e45e97e
stl10               10  2 08b234ce7b11dbd3 c97a3d1ad5819800
cifar100           100 18 3e2584150e2896e2 9bbf912e1144ca4c
cifar10             10 18 bb3914949cecedee 9bbf912e1144ca4c
food101            101  1 9c0eeb5a368baacb 77a79bac7d9cf25b
fashion_mnist       10  2 249370ed4284a97d c97a3d1ad5819800
emnist_letters      26  1 cfa4f846a6dbeb24 df7d55ac799e2a3b
kmnist              10  1 420ad158d8f0775d 12c1113974e99b08
rendered-sst2        2  1 2e61aa7558046c2c 9034019e8a14384c
"""
ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]


def table(**given: object) -> TaskTable:
    return TaskTable(**given)  # type: ignore[arg-type]


def birds(**given: object) -> Recipe:
    return Recipe(tasks={"my-birds": table(**given)})


DATA = Source("path", "birds", None, Path("birds"))


@pytest.mark.parametrize(
    ("name", "classes", "templates", "of_classes", "of_templates"), ROWS, ids=lambda row: row
)
def test_class_names_and_prompts_are_the_published_ones(name, classes, templates, of_classes, of_templates):
    task = tasks.find(name)
    assert (len(task.classes or ()), len(task.templates)) == (int(classes), int(templates))
    assert tasks.digest(task.classes or ()) == of_classes
    assert tasks.digest(task.templates) == of_templates


def test_the_published_tasks_come_first_and_in_their_order():
    assert tasks.names()[:20] == tuple(row[0] for row in ROWS)


def test_every_set_is_a_prefix_of_the_twenty():
    sets = tasks.sets()
    assert all(each == sets["tall20"][: len(each)] for name, each in sets.items() if name != "toy8")
    assert len(sets["ta8"]) == 8
    assert sets["ta8"][-1] == "dtd"
    assert [len(sets[f"tall{count}"]) for count in (10, 12, 14, 16, 18, 20)] == [10, 12, 14, 16, 18, 20]
    assert len(sets["toy8"]) == 8


def test_where_the_data_lie_is_as_published():
    assert str(tasks.find("svhn").data) == "hf:ufldl-stanford/svhn"
    assert tasks.find("svhn").config == "cropped_digits"
    assert tasks.find("food101").split == "validation"
    assert (tasks.find("fer2013").image_column, tasks.find("fer2013").label_column) == ("jpg", "cls")
    assert str(tasks.find("stanford-cars").data) == "hf:tanganke/stanford_cars"
    assert str(tasks.find("digits").data) == "toy:digits"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("stanford_cars", "stanford-cars"),
        ("tanganke/sun397", "sun397"),
        ("timm/oxford-iiit-pet", "oxford-iiit-pet"),
        ("dpdl-benchmark/oxford_flowers102", "oxford_flowers102"),
        ("nateraw/rendered-sst2", "rendered-sst2"),
    ],
)
def test_other_spellings_mean_the_same_task(alias, name):
    assert tasks.find(alias).name == name


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown task `mnsit` \(did you mean `mnist`\?\)"):
        tasks.find("mnsit")


def test_sets_expand_in_order_and_each_task_stands_once():
    assert tasks.expand(("dtd", "ta8", "stanford_cars", "digits")) == (
        "dtd", "sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "digits",
    )  # fmt: skip


def test_a_recipe_changes_a_built_in_task_and_leaves_the_rest_of_it():
    recipe = Recipe(tasks={"stanford_cars": table(data=DATA, split="val")})
    task = tasks.find("stanford-cars", recipe)
    assert (task.data, task.split, task.train_split) == (DATA, "val", "train")
    assert task.classes == tasks.find("stanford-cars").classes


def test_a_recipe_defines_a_task_whose_classes_come_from_the_data():
    task = tasks.find("my-birds", birds(data=DATA, templates=("a {}.",)))
    assert (task.classes, task.split, task.templates) == (None, "test", ("a {}.",))


def test_a_recipe_s_own_data_do_not_keep_the_hub_s_configuration():
    assert tasks.find("svhn", Recipe(tasks={"svhn": table(data=DATA)})).config is None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"data": DATA}, "`tasks.my-birds`: lacks `templates`"),
        ({"templates": ("a {}",)}, "`tasks.my-birds`: lacks `data`"),
        ({"data": DATA, "templates": ("a bird",)}, "expected `{}` once, for the class name, got `a bird`"),
        ({"data": DATA, "templates": ("{} {}",)}, "expected `{}` once, for the class name, got `{} {}`"),
        ({"data": DATA, "templates": ("{}",), "classes": ()}, "`tasks.my-birds.classes`: is empty"),
        ({"data": DATA, "templates": ("{}",), "classes": ("a", "a")}, "classes`: `a` stands there twice"),
        ({"data": DATA, "templates": ("{}",), "classes": ("a", " ")}, "a class without a name"),
    ],
)
def test_an_incomplete_task_is_refused_and_listed(given, line):
    recipe = birds(**given)
    assert [line in f"`{key}`: {what}" for key, what in tasks.problems(recipe)] == [True]
    with pytest.raises(UsageError) as caught:
        tasks.find("my-birds", recipe)
    assert line in caught.value.message


def test_all_problems_of_a_recipe_are_listed_at_once():
    recipe = Recipe(
        eval_tasks=("mnsit", "ta8", "tall13"), tasks={"new": table(), "svhn": table(classes=("x", "x"))}
    )
    assert tasks.problems(recipe) == [
        ("eval.tasks", "unknown task `mnsit` (did you mean `mnist`?)"),
        ("eval.tasks", "unknown task `tall13` (did you mean `tall18`?)"),
        ("tasks.new", "lacks `data`"),
        ("tasks.new", "lacks `templates`"),
        ("tasks.svhn.classes", "`x` stands there twice"),
    ]


def test_a_tuned_task_that_nothing_describes_is_no_problem_before_evaluation():
    recipe = Recipe(tuned={"unheard-of": parse_source("a.safetensors", Path())})
    assert tasks.problems(recipe) == []


def test_looking_up_a_task_imports_neither_torch_nor_numpy():
    code = "import sys; from mergecli.data import tasks; tasks.find('sun397'); tasks.find('digits'); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "PIL", "transformers", "datasets"} & set(loaded)


TASK = """description = "x"
data = "hf:org/x"
split = "test"
train_split = "train"
templates = ["a {}."]
classes = ["a", "b"]
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"x"', "x", "not TOML: "),
        ("classes", "clases", "`clases`: unknown key (did you mean `classes`?)"),
        ("classes", "clases", "lacks `classes`"),
        ('split = "test"\n', "", "lacks `split`"),
        ("a {}.", "a.", "`templates`: expected `{}` once, for the class name, got `a.`"),
        ('"b"', '"a"', "`classes`: `a` stands there twice"),
    ],
)
def test_a_file_of_a_task_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str
) -> None:
    (tmp_path / "mine.toml").write_text(TASK.replace(old, new, 1))
    monkeypatch.setattr(tasks, "_PROMPTS", tmp_path)
    monkeypatch.setattr(tasks, "names", lambda: ("mine",))
    with pytest.raises(UsageError) as caught:
        tasks.find("mine")
    assert f"mergecli/data/prompts/mine.toml: {said}" in caught.value.message
