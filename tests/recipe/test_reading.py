from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergecli import methods
from mergecli.recipe.reading import named_models, recipe_of
from mergecli.recipe.schema import recipe_text
from mergecli.runtime.errors import InputError, UsageError
from mergecli.runtime.notes import heard_by

WHOLE = """\
schema = 1
base = "hf:openai/clip-vit-base-patch32"
seed = 3
dtype = "float16"

[tuned]
sun397 = "models/a.safetensors"
"stanford-cars" = "hf:x/y"

[method]
name = "ties"
density = 0.1

[eval]
tasks = ["ta8", "birds"]
batch_size = 64

[tasks.birds]
data = "data/birds"
classes = ["robin", "wren"]
templates = ["a photo of a {}."]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(WHOLE)
    return path


def test_every_key_is_read(file: Path) -> None:
    recipe = recipe_of(file)
    assert (str(recipe.base), recipe.seed, recipe.dtype) == ("hf:openai/clip-vit-base-patch32", 3, "float16")
    assert list(recipe.tuned) == ["sun397", "stanford-cars"]
    assert (recipe.method, recipe.settings) == ("ties", {"density": 0.1})
    assert (recipe.eval_tasks, recipe.batch_size) == (("ta8", "birds"), 64)
    assert recipe.tasks["birds"].classes == ("robin", "wren")


def test_paths_are_relative_to_the_recipe_but_in_changes_to_the_current_folder(file: Path) -> None:
    recipe = recipe_of(file, changes=["tuned.stanford-cars=other.safetensors"])
    assert recipe.tuned["sun397"].path == file.parent / "models/a.safetensors"
    assert recipe.tuned["stanford-cars"].path == Path("other.safetensors")
    assert recipe.tasks["birds"].data is not None
    assert recipe.tasks["birds"].data.path == file.parent / "data/birds"


def test_a_change_below_a_source_changes_that_model_and_adds_none(file: Path) -> None:
    changes = ["tuned.sun397.dtype=float16", "tuned.stanford-cars.source=hf:y/z", "base.revision=v2"]
    recipe = recipe_of(file, changes=changes)
    assert list(recipe.tuned) == ["sun397", "stanford-cars"]
    assert recipe.tuned["sun397"].path == file.parent / "models/a.safetensors"
    assert [recipe.tuned["sun397"].dtype, str(recipe.tuned["stanford-cars"])] == ["float16", "hf:y/z"]
    assert str(recipe.base) == "hf:openai/clip-vit-base-patch32@v2"
    assert list(recipe_of(file, changes=["tuned.a.b=toy:digits"]).tuned)[-1] == "a.b"


def test_a_method_on_the_command_line_replaces_the_table_and_changes_follow(file: Path) -> None:
    recipe = recipe_of(file, changes=["method.scaling_factor=0.5"], method="task_arithmetic")
    assert (recipe.method, recipe.settings) == ("task_arithmetic", {"scaling_factor": 0.5})


@pytest.mark.parametrize(
    ("change", "value"),
    [("method.aggregate=mean", "mean"), ('method.aggregate="max"', "max"), ("method.aggregate = sum", "sum")],
)
def test_a_bare_word_in_a_change_is_a_string(file: Path, change: str, value: str) -> None:
    assert recipe_of(file, changes=[change]).settings["aggregate"] == value


def test_all_problems_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'shcema = 1\nbase = 3\nseed = -1\ndtype = "float61"\n\n[tuned]\n_x_ = "x"\n\n[method]\nname = "ties"\n'
        'density = 1.5\nagregate = "sum"\n\n[eval]\nbatch_size = 0\ntasks = ["mnits"]\n'
    )
    with pytest.raises(UsageError) as error:
        recipe_of(path)
    lines = str(error.value).splitlines()
    assert lines[0] == "the recipe has 9 problems:"
    assert [line.strip().removeprefix(f"{path}:") for line in lines[1:]] == [
        "1: `shcema`: unknown key (did you mean `schema`?)",
        "2: `base`: expected a string, got 3",
        "3: `seed`: expected a whole number, at least 0, got -1",
        '4: `dtype`: expected one of same, float32, float16, bfloat16, got "float61" (did you mean `float16`?)',
        "7: `tuned._x_`: names that begin with an underscore are reserved: expected letters, digits, `-`, `_`, "
        "`.` or `+`, beginning with a letter or digit",
        "11: `method.density`: expected a number in (0, 1], got 1.5",
        "12: `method.agregate`: unknown setting (did you mean `aggregate`?); there are `scaling_factor`, `density`, "
        "`aggregate`, `trim`, `zero_sign`",
        "15: `eval.batch_size`: expected a whole number, at least 1, got 0",
        "16: `eval.tasks`: unknown task `mnits` (did you mean `mnist`?)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [1,", r"r.toml:1: not TOML"),
        (
            "schema = 2",
            r"r.toml:1: `schema`: expected 1, got 2: this recipe is for another version of mergecli",
        ),
        ("tuned = 3", r"r.toml:1: `tuned`: expected a table, got 3"),
        ("[method]\ndensity = 1", r"`method.name`: is missing"),
        (
            "[method]\nname = 'tise'",
            r"r.toml:2: `method.name`: unknown method `tise` \(did you mean `ties`\?\)",
        ),
        (
            "[method]\nname = 'ties'\ndensity = '1'",
            r"r.toml:3: `method.density`: expected a number in \(0, 1\], got \"1\"",
        ),
        (
            "[method]\nname = 'ties'\ndensity = true",
            r"`method.density`: expected a number in \(0, 1\], got true",
        ),
        ("[method]\nname = 'ties'\ndensity = nan", r"`method.density`: expected a number"),
        (
            "[method]\nname = 'ties'\ntrim = 'modle'",
            r'`method.trim`: expected one of "model", "tensor", "fusion_bench"',
        ),
        (
            "[method]\nname = 'weighted_average'",
            r"`method.weights`: is missing: expected a list, each a number",
        ),
        ("[method]\nname = 'average'\nx = 1", r"`method.x`: unknown setting; this method has none"),
        ("[tuned]\nx = 'hg:a/b'", r"r.toml:2: `tuned.x`: source `hg:a/b`: unknown prefix `hg:`"),
    ],
)
def test_one_problem_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        recipe_of(tmp_path / "r.toml")
    assert len(error.value.message.splitlines()) == 1


def message_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(UsageError) as error:
        recipe_of(*args, **kwargs)
    return str(error.value)


LISTS = "\nhint: `mergecli methods` lists them"


@pytest.mark.parametrize(
    ("method", "meant"),
    [
        ("teis", "`ties`"),
        ("TIES", "`ties`"),
        ("ties-merging", "`ties`"),
        ("task-arithmetic", "`task_arithmetic`"),
        ("simple_average", "`average`"),
        ("wemoe", "`weight_ensembling_moe`"),
        ("regmean++", "`reg_mean_plus_plus`"),
        ("clip_task_wise_adamerging", "`ada_merging` with `method.granularity=task`"),
        ("dare-ties", "`dare` with `method.of=ties`"),
        ("DARE/ties_merging", "`dare` with `method.of=ties`"),
        ("ties_lines", "`lines` with `method.of=ties`"),
        ("dare_linear", "`dare`"),
        ("della_linear", "`della` with `method.elect=false`"),
        ("breadcrumbs_ties", "`breadcrumbs`"),
    ],
)
def test_a_method_is_found_by_what_papers_and_other_tools_call_it(
    file: Path, method: str, meant: str
) -> None:
    assert (
        message_of(file, method=method)
        == f"--method: unknown method `{method}` (did you mean {meant}?){LISTS}"
    )


def test_a_method_that_nothing_is_like_is_only_unknown(file: Path) -> None:
    assert message_of(file, method="passthrough") == f"--method: unknown method `passthrough`{LISTS}"
    assert message_of(file, method="") == '--method: expected a string that is not empty, got ""'


def test_every_other_name_leads_to_settings_that_the_method_takes() -> None:
    for name in methods.names():
        for other, setting in methods.find(name).also_called.items():
            assert other not in methods.names()
            recipe_of(
                {"a": "a", "b": "b"}, base="c", method=name, changes=[f"method.{setting}"] if setting else []
            )


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("density=0.5", "method.density"),
        ("scaling-factor=0.5", "method.scaling_factor"),
        ("lambda=0.5", "method.scaling_factor"),
        ("top_k=0.5", "method.density"),
        ("batch_size=8", "eval.batch_size"),
        ("models=8", "tuned"),
        ("base_model=x", "base"),
        ("methods.density=0.5", "method"),
    ],
)
def test_a_key_whose_table_was_left_out_is_found(file: Path, change: str, meant: str) -> None:
    key = change.partition("=")[0].partition(".")[0]
    assert message_of(file, changes=[change]) == f"--set: `{key}`: unknown key (did you mean `{meant}`?)"


def test_a_key_like_no_other_is_told_which_there_are(file: Path) -> None:
    known = (
        "`schema`, `base`, `seed`, `dtype`, `space`, `as_adapter`, `rank`, `leave_out`, `pool`, `tuned`, `method`, `eval`, "
        "`continual`, `tasks`"
    )
    assert message_of(file, changes=["zzz=1"]) == f"--set: `zzz`: unknown key; there are {known}"


def test_a_pool_is_a_name_and_stands_in_the_recipe_in_effect(file: Path) -> None:
    assert message_of(file, changes=["pool=3"]).startswith("--set: `pool`: expected ")
    named = recipe_of(file, changes=["pool=mine"])
    assert named.pool == "mine"
    assert 'pool = "mine"\n' in recipe_text(named)
    assert "pool" not in recipe_text(recipe_of(file))


@pytest.mark.parametrize(
    ("word", "meant"), [("lambda", "scaling_factor"), ("k", "density"), ("merge_func", "aggregate")]
)
def test_a_setting_is_found_by_the_papers_letter_and_other_tools_words(
    file: Path, word: str, meant: str
) -> None:
    message = message_of(file, changes=[f"method.{word}=1"])
    assert message.startswith(
        f"--set: `method.{word}`: unknown setting (did you mean `{meant}`?); there are "
    )


def test_a_methods_name_alone_stands_for_its_table(file: Path, tmp_path: Path) -> None:
    dare = recipe_of(file, method="dare", changes=["method.of=ties"])
    assert methods.table_of(dare.built)["of"] == methods.table_of(methods.create("ties", {})) | {
        "name": "ties"
    }
    dare = recipe_of(file, method="dare", changes=["method.of=ties", "method.of.density=0.3"])
    assert methods.table_of(dare.built)["of"]["density"] == 0.3
    (tmp_path / "short.toml").write_text('method = "ties"\n')
    assert methods.name_of(recipe_of(tmp_path / "short.toml").built) == "ties"


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("tise", f"--set: `method.of.name`: unknown method `tise` (did you mean `ties`?){LISTS}"),
        (
            "fisher",
            "--set: `method.of.name`: `fisher` looks at images, and cannot be changed by another method",
        ),
        ("della", "--set: `method.of`: `della` drops entries by the same random numbers: drop them once"),
    ],
)
def test_a_methods_name_alone_is_checked_as_its_table_is(file: Path, of: str, message: str) -> None:
    assert message_of(file, method="dare", changes=[f"method.of={of}"]) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("density", r"^--set: `density`: expected `KEY=VALUE`, such as `method.scaling_factor=0.3`$"),
        ("method.density=[1", r"^--set: `method.density`: expected a TOML value, got `\[1`$"),
        ("method.density=", r"^--set: `method.density`: expected a TOML value, got nothing$"),
        ("base.x=1", r"`base.x`: `base` is not a table"),
        ("method.densty=0.1", r"^--set: `method.densty`: unknown setting \(did you mean `density`"),
    ],
)
def test_a_change_that_means_nothing_is_refused(file: Path, change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(file, changes=[change])


def test_a_recipe_that_is_missing_or_a_folder_or_not_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.toml: no such recipe"):
        recipe_of(tmp_path / "none.toml")
    (tmp_path / "link.toml").symlink_to("none.toml")
    with pytest.raises(InputError, match=r"link.toml: no such recipe$"):
        recipe_of(tmp_path / "link.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"is a folder, a recipe \(TOML\) was expected"):
        recipe_of(tmp_path / "folder.toml")
    (tmp_path / "latin.toml").write_bytes("# möglich".encode("latin-1"))
    with pytest.raises(UsageError, match=r"a recipe is UTF-8 text, byte 3 is not"):
        recipe_of(tmp_path / "latin.toml")


def test_models_without_a_file_are_checked_the_same_way() -> None:
    with pytest.raises(UsageError, match=r"^--set: `method.density`: expected a number in \(0, 1\], got 2"):
        recipe_of({"a": "a"}, base="b", changes=["method.density=2"], method="ties")
    with pytest.raises(UsageError, match=r"^settings: `method.density`: expected a number"):
        recipe_of({"a": "a"}, base="b", method="ties", settings={"density": 2})


def test_a_source_may_be_a_table_that_says_more(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        'base = { source = "hf:openai/clip", modelscope = "openai-mirror/clip", revision = "v1" }\n[tuned]\n'
        'a = { source = "hf:org/a", subfolder = "vision", file = "m.safetensors", dtype = "float16" }\n'
        'b = { source = "weights/b", adapter = "hf:org/lora@v2" }\n'
    )
    recipe = recipe_of(file)
    base, a, b = recipe.base, recipe.tuned["a"], recipe.tuned["b"]
    assert base is not None
    assert (str(base), base.modelscope) == ("hf:openai/clip@v1", "openai-mirror/clip")
    assert (str(a), a.dtype, a.label) == (
        "hf:org/a#vision/m.safetensors",
        "float16",
        "hf:org/a#vision/m.safetensors as float16",
    )
    assert b.path == tmp_path / "weights/b"
    assert (str(b.adapter), b.label) == ("hf:org/lora@v2", "b + hf:org/lora@v2")
    assert a.written == {"source": "hf:org/a#vision/m.safetensors", "dtype": "float16"}


def test_every_mistake_in_the_table_of_a_source_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        'base = { revision = "x" }\n[tuned]\na = { source = "hf:org/a@v1", revision = "v2", dtype = "int8" }\n'
        'b = { source = "p", subfolder = "../up", modelscope = "org/b", sorce = 1 }\nc = { source = 3 }\n'
    )
    with pytest.raises(UsageError) as caught:
        recipe_of(file)
    assert [line.strip().replace(f"{file}:", "") for line in caught.value.message.splitlines()[1:]] == [
        "1: `base.source`: is missing: expected a source such as `hf:org/name`, or a path",
        "3: `tuned.a.revision`: the source has one already",
        '3: `tuned.a.dtype`: expected one of float32, float16, bfloat16, got "int8"',
        "4: `tuned.b.sorce`: unknown key (did you mean `source`?)",
        '4: `tuned.b.modelscope`: expected `org/name` beside an `hf:` source, got "org/b"',
        "4: `tuned.b.subfolder`: `../up`: expected a file or folder inside the repository, such as "
        "`vision/model.safetensors`",
        "5: `tuned.c.source`: expected a string, got 3",
    ]


def test_the_name_that_other_programs_give_the_base_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[tuned]\n_pretrained_ = "x"\n')
    with pytest.raises(UsageError, match="the pre-trained model is called `base` here"):
        recipe_of(file)


def test_settings_of_a_python_call_stay_the_values_that_they_are(file: Path) -> None:
    weights = (1, 2)
    for what in (file, recipe_of(file), {"sun397": "a", "stanford-cars": "b"}):
        recipe = recipe_of(what, method="weighted_average", settings={"weights": weights})
        assert recipe.settings["weights"] is weights


def test_settings_of_a_python_call_may_be_numbers_of_other_libraries() -> None:
    several = {"density": np.float32(0.5), "scaling_factor": torch.tensor(2)}
    recipe = recipe_of({"a": "a"}, base="b", method="ties", settings=several)
    assert recipe.settings == {"density": 0.5, "scaling_factor": 2}
    weighted = {"weights": np.array([1.0, 3.0])}
    recipe = recipe_of(["a", "x=b"], base="b", method="weighted_average", settings=weighted)
    assert (list(recipe.tuned), recipe.settings) == (["a", "x"], {"weights": [1.0, 3.0]})


def test_a_change_below_a_table_leaves_the_callers_table_alone(file: Path) -> None:
    of = {"name": "ties", "density": 0.5}
    recipe = recipe_of(file, method="lines", settings={"of": of}, changes=["method.of.density=0.1"])
    assert (recipe.settings["of"]["density"], of["density"]) == (0.1, 0.5)


def test_a_recipe_in_memory_takes_another_method_or_more_settings_and_nothing_else(file: Path) -> None:
    known = recipe_of(file)
    more = recipe_of(known, settings={"scaling_factor": 0.5}, changes=["method.density=0.2"])
    assert more.settings == {"density": 0.2, "scaling_factor": 0.5}
    other = recipe_of(known, method="task_arithmetic")
    assert (other.method, other.settings, known.method) == ("task_arithmetic", {}, "ties")
    with pytest.raises(UsageError, match="`seed`: cannot be changed in a recipe that is no file"):
        recipe_of(known, changes=["seed=3"])
    with pytest.raises(UsageError, match=r"^settings: `method.density`: expected a number"):
        recipe_of(known, settings={"density": 2})


def test_a_problem_is_blamed_on_the_option_that_its_table_came_from(file: Path) -> None:
    with pytest.raises(UsageError, match=r"^--method: `method.weights`: is missing"):
        recipe_of(file, method="weighted_average")
    with pytest.raises(UsageError, match=r"^--set: `tuned.a.source`: expected a string, got 3"):
        recipe_of(file, changes=["tuned.a={ source = 3 }"])
    changed = recipe_of(file, changes=['tuned.a={ source = "b" }'])
    assert changed.tuned["a"].path == Path("b")


def test_a_base_beside_a_recipe_is_refused(file: Path) -> None:
    for recipe in (file, recipe_of(file)):
        with pytest.raises(UsageError, match="a recipe names its base itself"):
            recipe_of(recipe, base="other")


def test_a_method_is_checked_and_built_once_for_a_recipe(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    create = methods.create

    def counted(name: str, *others: Any) -> methods.Method:
        built.append(name)
        return create(name, *others)

    monkeypatch.setattr(methods, "create", counted)
    recipe = recipe_of(recipe_of(file, method="lines", settings={"of": {"name": "ties"}}))
    assert recipe.built is recipe.built
    assert built == ["lines", "ties"]


LAYERS = """base = "toy:base"
[tuned]
a = "toy:digits"
[method]
name = "ties"
[[method.layers]]
match = "mlp"
density = 0.5
[[method.layers]]
match = "norm"
density = 2
"""


def test_a_setting_by_layer_is_changed_by_its_number_and_wrong_ones_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "layers.toml"
    path.write_text(LAYERS)
    assert message_of(path) == f"{path}:11: `method.layers[1].density`: expected a number in (0, 1], got 2"
    right = "method.layers[1].density={ first = 0.1, last = 0.2 }"
    changes = [right, "method.layers[0].density=0.25", "method.layers[2].match=attention"]
    lines = recipe_of(path, changes=[*changes, "method.layers[2].keep=a"]).built.layers
    assert [(line.match, line.keep, line.settings) for line in lines] == [
        (("mlp",), None, {"density": 0.25}),
        (("norm",), None, {"density": {"first": 0.1, "last": 0.2}}),
        (("attention",), "a", {}),
    ]
    assert message_of(path, changes=[right, "method.layers[3].density=1"]) == (
        "--set: `method.layers[3].density`: `layers[3]`: there are 2 of them; `[2]` adds one"
    )
    assert message_of(path, changes=[right, "method.layers[0].density=3"]) == (
        "--set: `method.layers[0].density`: expected a number in (0, 1], got 3"
    )
    assert message_of(path, changes=[right, "method.layers.density=3"]) == (
        "--set: `method.layers.density`: `layers` is not a table"
    )
    assert message_of(path, changes=["method.layers=[{ match = 'mlp', density = 3 }]"]) == (
        "--set: `method.layers[0].density`: expected a number in (0, 1], got 3"
    )


def test_a_recipe_in_effect_has_its_settings_by_layer_and_gives_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "layers.toml"
    path.write_text(LAYERS.replace("density = 2", "scaling_factor = { first = 0.1, last = 0.2 }"))
    known = recipe_of(path)
    again = tmp_path / "again.toml"
    again.write_text(recipe_text(known, "ties", methods.recipe_table(known.built)))
    assert recipe_of(again).built == known.built


def test_a_pattern_that_also_names_what_chains_remember_means_the_models() -> None:
    said: list[str] = []
    with heard_by(said.append):
        found = named_models(
            ["out/a.safetensors", "out/a.state.safetensors", "out/b.state.safetensors"], None, ()
        )
    assert [name for name, _ in found] == ["a", "b.state"]
    assert said == ["left out `out/a.state.safetensors`: what a chain remembers beside its model is no model"]
