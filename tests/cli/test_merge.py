from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Run, World, assert_same
from tests.methods.reference.average import average


def test_a_recipe_is_merged_and_its_path_printed(world: World, run: Run) -> None:
    (world.folder / "r.toml").write_text(
        'base = "base.safetensors"\n[tuned]\nt1 = "t1.safetensors"\nt2 = "t2.safetensors"\n[method]\nname = "average"\n'
    )
    ended = run("merge", "r.toml", "-o", "out/m.safetensors")
    assert (ended.status, ended.out, ended.err) == (0, "out/m.safetensors\n", "")
    want = average([world.tuned["t1"], world.tuned["t2"]])
    assert_same(
        load_file(world.folder / "out/m.safetensors"), {**want, "steps": world.base["steps"]}, atol=1e-6
    )


def test_the_same_inputs_give_the_same_bytes_from_any_folder(world: World, run: Run) -> None:
    models = ["t1.safetensors", "t2.safetensors"]
    common = ["--method", "ties", "--set", "method.density=0.1"]
    run("merge", "--base", "base.safetensors", *models, *common, "-o", "a.safetensors")
    absolute = [world.folder / name for name in models]
    run("merge", "--base", world.base_file, *absolute, *common, "-o", "b.safetensors")
    run("merge", "--base", "base.safetensors", *models, *common, "-o", "c.safetensors", OMP_NUM_THREADS="1")
    first = (world.folder / "a.safetensors").read_bytes()
    assert (
        first
        == (world.folder / "b.safetensors").read_bytes()
        == (world.folder / "c.safetensors").read_bytes()
    )


def test_a_file_says_what_it_is_and_its_recipe_makes_it_again(world: World, run: Run) -> None:
    run(
        "merge",
        "--base",
        "base.safetensors",
        "t1.safetensors",
        "t2.safetensors",
        "--method",
        "ties",
        "-o",
        "m.safetensors",
    )
    about = json.loads(run("info", "m.safetensors", "--json").out)
    assert about["kind"] == "checkpoint"
    assert about["metadata"]["method"] == "ties"
    assert set(json.loads(about["metadata"]["inputs"])) == {"base", "t1", "t2"}
    assert str(world.folder) not in json.dumps(about["metadata"])
    (world.folder / "again.toml").write_text(run("info", "m.safetensors", "--recipe").out)
    ended = run("merge", "again.toml", "-o", "again.safetensors")
    assert ended.status == 0, ended.err
    assert (world.folder / "again.safetensors").read_bytes() == (world.folder / "m.safetensors").read_bytes()


def test_the_json_output_names_the_digest_of_every_input(world: World, run: Run) -> None:
    ended = run(
        "merge", "t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors", "--json"
    )
    written = json.loads(ended.out)
    assert written["tasks"] == ["t1", "t2"]
    assert written["inputs"]["t1"] == json.loads(run("info", "t1.safetensors", "--json").out)["digest"]


@pytest.mark.parametrize(("dtype", "want"), [("bfloat16", torch.bfloat16), ("same", torch.float32)])
def test_the_dtype_is_that_of_the_base_or_the_one_asked_for(
    world: World, run: Run, dtype: str, want: torch.dtype
) -> None:
    models = ["--base", "base.safetensors", "t1.safetensors", "t2.safetensors"]
    run("merge", *models, "--method", "average", "--set", f"dtype={dtype}", "-o", "m.safetensors")
    got = load_file(world.folder / "m.safetensors")
    assert got["conv"].dtype == want
    assert got["steps"].dtype == torch.int64


def test_a_folder_loads_in_transformers_and_keeps_the_prefix(
    tmp_path_factory: pytest.TempPathFactory, world: World, run: Run
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    models: list[CLIPVisionModel] = []
    for seed, name in enumerate(("base", "t1", "t2")):
        torch.manual_seed(seed)
        models.append(CLIPVisionModel(config))
        models[-1].save_pretrained(world.folder / f"folder-{name}")
    ended = run(
        "merge", "--base", "folder-base", "a=folder-t1", "b=folder-t2", "--method", "task_arithmetic",
        "--set", "method.scaling_factor=0.5", "-o", "merged",
    )  # fmt: skip
    assert (ended.status, ended.out) == (0, "merged\n"), ended.err
    assert sorted(file.name for file in (world.folder / "merged").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    keys = load_file(world.folder / "merged/model.safetensors")
    assert all(key.startswith("vision_model.") for key in keys)
    loaded, report = CLIPVisionModel.from_pretrained(world.folder / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for key, value in loaded.state_dict().items():
        base, one, two = (model.state_dict()[key] for model in models)
        torch.testing.assert_close(value, base + 0.5 * ((one - base) + (two - base)), atol=1e-6, rtol=0)


def test_checkpoints_of_any_architecture_are_merged(world: World, run: Run) -> None:
    for value, name in enumerate(("x", "y")):
        save_file(
            {"model.layers.0.q.weight": torch.full((4, 4), float(value)), "norm": torch.ones(2)},
            world.folder / f"{name}.safetensors",
        )
    ended = run("merge", "x.safetensors", "y.safetensors", "--method", "average", "-o", "m.safetensors")
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.safetensors", "-o", "m.safetensors"], "error: no method is named\nhint: name one with `--method NAME`; `mergecli methods` lists them"),
        (["r.toml", "--base", "b", "-o", "m.safetensors"], "error: --base: a recipe names its base itself"),
        (["x.safetensors", "--method", "average"], "error: -o/--output is missing\nhint: `mergecli merge --help` shows what is expected"),
        (["x.safetensors", "--method", "averge", "-o", "m.safetensors"], "error: --method: unknown method `averge` (did you mean `average`?)"),
        (["x.safetensors", "--method", "average", "-o", "m.pt"], "error: m.pt: expected a `.safetensors` file"),
        (["a/x.safetensors", "b/x.safetensors", "--method", "average", "-o", "m.safetensors"], "error: two models are called `x`"),
    ],
)  # fmt: skip
def test_wrong_usage_has_status_2_and_one_clear_error(run: Run, arguments: list[str], message: str) -> None:
    ended = run("merge", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(message)


def test_a_folder_can_be_sharded_and_holds_the_same(world: World, run: Run) -> None:
    (world.folder / "base").mkdir()
    world.base_file.rename(world.folder / "base" / "model.safetensors")
    models = ["merge", "--base", "base", "t1.safetensors", "t2.safetensors", "--method", "task_arithmetic"]
    for output, more in (
        ("whole", []),
        ("parts", ["--shard-size", "10KB"]),
        ("parts", ["--shard-size", "1KB"]),
    ):
        ended = run(*models, "-o", output, *more)
        assert (ended.status, ended.out, ended.err) == (0, f"{output}\n", "")
    names = sorted(
        re.sub("model-[0-9a-f]{12}-", "model-", file.name) for file in (world.folder / "parts").iterdir()
    )
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names == ["README.md", *parts, "model.safetensors.index.json"]
    digests = [json.loads(run("info", output, "--json").out)["digest"] for output in ("whole", "parts")]
    assert digests[0] == digests[1]
    run(*models, "-o", "parts")
    assert sorted(file.name for file in (world.folder / "parts").iterdir()) == [
        "README.md",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "m.safetensors", "--shard-size", "1GB"], "error: m.safetensors: one file has no shards"),
        (
            ["-o", "m", "--shard-size", "big"],
            "error: --shard-size: expected a size such as `500MB` or `20GB`, got `big`",
        ),
        (["-o", "m", "--device", "cuda:9"], "error: device `cuda:9`: cannot be used here"),
    ],
)
def test_shards_and_devices_that_cannot_be_are_refused(
    world: World, run: Run, arguments: list[str], message: str
) -> None:
    ended = run("merge", "t1.safetensors", "--method", "average", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(message)
