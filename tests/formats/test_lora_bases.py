"""An adapter is put on the base that it says it was made on, by whichever command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergecli.evaluation.evaluate import evaluate
from mergecli.formats.info import info
from mergecli.formats.lora_files import base_name, expect_base, open_adapter
from mergecli.merging.cos_sim import cos_sim
from mergecli.merging.extract import extract
from mergecli.merging.merge import merge
from mergecli.merging.pool import ModelPool
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError, MergecliWarning
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from mergecli.training.finetune import finetune
from tests.conftest import Run
from tests.formats.test_lora import PLAIN, configure, pytestmark, write_adapter, write_tower
from tests.support.tiny_clip import make_image_task, make_tiny_clip

__all__ = ["pytestmark"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `base`, an `other` of the same shapes, a task, and an adapter `lora` that was trained on the base."""
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("base", "other")):
        make_tiny_clip(folder / name, seed=seed)
    make_image_task(folder / "tints")
    text = 'schema = 1\nbase = "base"\n[tasks.tints]\ndata = "tints"\ntemplates = ["something {}"]\n'
    (folder / "recipe.toml").write_text(text)
    finetune(
        folder / "recipe.toml", task="tints", output=folder / "lora", steps=1, batch_size=4, lora=True, rank=2
    )
    return folder


USES: dict[str, Callable[[Path, Path, Path], object]] = {
    "eval": lambda world, base, _: evaluate(
        world / "lora", recipe=world / "recipe.toml", clip=base, tasks="tints", cache=False
    ),
    "merge": lambda world, base, out: merge({"a": world / "lora"}, base=base, method="average", output=out),
    "merge with differences": lambda world, base, out: merge(
        {"a": world / "lora"}, base=base, method="task_arithmetic", output=out
    ),
    "extract": lambda world, base, out: extract(world / "lora", base=base, rank=2, output=out.with_suffix("")),
    "taskvector": lambda world, base, out: taskvector(world / "lora", base=base, output=out),
    "cos-sim": lambda world, base, _: cos_sim(
        {"a": world / "lora", "b": world / "other"}, base=base
    ),
    "a pool": lambda world, base, _: ModelPool({"base": base, "a": world / "lora"}).load_model("a"),
    "a pool's whole CLIP": lambda world, base, _: ModelPool(
        {"base": base, "a": world / "lora"}
    ).load_clip_model("a"),
    "a source with an adapter": lambda world, base, _: ModelPool(
        {"a": {"source": str(base), "adapter": str(world / "lora")}}
    ).load_model("a"),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_use_on_another_base_of_the_same_shapes_is_refused(
    world: Path, tmp_path: Path, use: str
) -> None:
    USES[use](world, world / "base", tmp_path / "m.safetensors")
    with pytest.raises(InputError) as caught:
        USES[use](world, world / "other", tmp_path / "n.safetensors")
    ours, theirs = (info(world / name).digest for name in ("base", "other"))
    assert caught.value.message == (
        f"{world}/lora/adapter_model.safetensors: is an adapter for another base: expected base ({ours}), "
        f"got other ({theirs})"
    )
    assert "name the base that it was made on" in caught.value.hint
    assert not list(tmp_path.glob("n*"))


def test_the_same_tower_by_itself_is_the_same_base(world: Path, tmp_path: Path) -> None:
    whole = load_file(world / "base" / "model.safetensors")
    save_file(
        {name: each for name, each in whole.items() if name.startswith("vision")}, tmp_path / "a.safetensors"
    )
    merge(
        {"a": world / "lora"},
        base=tmp_path / "a.safetensors",
        method="average",
        output=tmp_path / "m.safetensors",
    )
    assert (tmp_path / "m.safetensors").exists()


def test_an_adapter_out_of_a_task_vector_knows_the_vectors_base(world: Path, tmp_path: Path) -> None:
    taskvector(world / "lora", base=world / "base", output=tmp_path / "v.safetensors")
    extract(tmp_path / "v.safetensors", rank=2, output=tmp_path / "again")
    with pytest.raises(InputError, match="for another base: expected xxh3:"):
        ModelPool({"base": world / "other", "a": tmp_path / "again"}).load_model("a")


@pytest.mark.parametrize(
    ("said", "base", "is_told"),
    [
        ("openai/clip-vit-base-patch32", "hf:openai/clip-vit-large-patch14", True),
        ("openai/clip-vit-base-patch32", "ms:AI-ModelScope/clip-vit-large-patch14", True),
        ("hf:openai/clip-vit-base-patch32@main", "hf:openai/clip-vit-large-patch14", True),
        ("openai/clip-vit-base-patch32", "hf:laion/CLIP-ViT-base-patch32@main", False),
        ("/models/clip-vit-base-patch32", "hf:openai/clip-vit-large-patch14", False),
        ("./clip/vit", "hf:openai/clip-vit-large-patch14", False),
        ("openai/clip-vit-base-patch32", "other.safetensors", False),
        (None, "hf:openai/clip-vit-large-patch14", False),
    ],
)
def test_where_only_names_are_known_two_of_a_hub_are_compared(
    tmp_path: Path, said: str | None, base: str, is_told: bool
) -> None:
    folder = write_adapter(tmp_path / "adapter", **PLAIN)
    configure(folder, base_model_name_or_path=said)
    adapter = open_adapter(folder)
    with (
        adapter.stored,
        open_checkpoint(write_tower(tmp_path / "b.safetensors")) as tower,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        expect_base(adapter, tower, parse_source(base, Path()))
    text = (
        f"{folder}/adapter_model.safetensors: is an adapter for another base: expected "
        f"openai/clip-vit-base-patch32, got {base}"
    )
    assert [(each.category, str(each.message)) for each in caught] == [(MergecliWarning, text)] * is_told


def test_the_program_warns_on_stderr_once(tmp_path: Path, run: Run) -> None:
    store = tmp_path / "home" / "hf" / "org" / "clip"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("a" * 40)
    (store / ("a" * 40)).mkdir()
    write_tower(store / ("a" * 40) / "model.safetensors")
    configure(write_adapter(tmp_path / "adapter", **PLAIN), base_model_name_or_path="org/other")
    ended = run(
        "cos-sim", "a=adapter", "b=hf:org/clip", "--base", "hf:org/clip", MERGECLI_HOME=str(tmp_path / "home")
    )
    assert (ended.status, ended.err) == (
        0,
        "warning: adapter/adapter_model.safetensors: is an adapter for another base: expected org/other, got hf:org/clip\n"
        "warning: `b` has the weights of the base: its task vector is zero, and so are its cosines with others\n",
    )
    assert ended.out


def test_a_base_is_written_as_peft_finds_it(world: Path) -> None:
    sources = {
        "hf:openai/clip@main": "openai/clip", "toy:base": "toy:base", "ms:org/clip": "ms:org/clip",
        "folder/base": "base",
    }  # fmt: skip
    assert {text: base_name(parse_source(text, Path())) for text in sources} == sources
    config = json.loads((world / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
