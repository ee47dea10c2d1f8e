"""Adapters merge into one adapter: in plain peft it is what the whole weights of all would merge to."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModel

from mergecli.formats import info as inspection
from mergecli.merging.extract import extract
from mergecli.merging.merge import Merged, merge
from mergecli.recipe.reading import recipe_of
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.checkpoint import VISION
from tests.conftest import Run
from tests.formats.test_lora import (
    PLAIN,
    configure,
    merged_by_peft,
    pytestmark,
    read,
    rewrite,
    tower,
    write_adapter,
    write_linearized,
    write_tower,
)  # fmt: skip
from tests.methods.reference.ties import ties

__all__ = ["pytestmark"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "stabilized": {
        **PLAIN, "r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "fc1", "out_proj"],
        "rank_pattern": {"fc1": 3}, "alpha_pattern": {r"layers\.1\.mlp\.fc1": 7},
    },
    "embeddings": {**PLAIN, "r": 3, "target_modules": ["patch_embedding", "position_embedding", "v_proj"]},
}  # fmt: skip
CLOSE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of several kinds for it."""
    folder = tmp_path_factory.mktemp("made")
    write_tower(folder / "base.safetensors")
    for seed, (name, settings) in enumerate(KINDS.items(), 1):
        write_adapter(folder / name, seed, **settings)
    write_adapter(folder / "dora", 5, **PLAIN, use_dora=True)
    write_linearized(folder / "linearized", **PLAIN)
    return folder


def merged(folder: Path, output: Path, names: Mapping[str, Any] | None = None, **how: Any) -> Merged:
    models = {name: folder / name for name in KINDS} if names is None else names
    changes = [f"{key}={how.pop(key)}" for key in ("space", "dtype") if key in how]
    return merge(
        models,
        base=folder / "base.safetensors",
        output=output,
        changes=changes,
        **{"as_adapter": True, **how},
    )


def changes_of(folder: Path, names: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The change of every weight by each adapter, as peft merges it, in float64."""
    before = load_file(folder / "base.safetensors")
    return [
        {name: each.double() - before[name].double() for name, each in merged_by_peft(folder / path).items()}
        for path in names
    ]


def change(folder: Path, output: Path) -> dict[str, Tensor]:
    """The change by the adapter that was written, as peft merges it."""
    before = load_file(folder / "base.safetensors")
    return {name: each.double() - before[name].double() for name, each in merged_by_peft(output).items()}


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], atol: float = CLOSE) -> None:
    assert sorted(got) == sorted(want)
    for name, each in want.items():
        torch.testing.assert_close(got[name].double(), each.double(), atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
@pytest.mark.parametrize(
    ("method", "settings", "weights"),
    [
        ("average", {}, [1 / 3] * 3),
        ("task_arithmetic", {"scaling_factor": 0.7}, [0.7] * 3),
        ("weighted_average", {"weights": [2.0, 1.0, -1.0]}, [1.0, 0.5, -0.5]),
    ],
)
def test_linear_methods_keep_the_sum_of_the_products(
    made: Path, tmp_path: Path, space: str, method: str, settings: dict[str, Any], weights: list[float]
) -> None:
    done = merged(made, tmp_path / "out", method=method, settings=settings, space=space)
    parts = changes_of(made, KINDS)
    want = {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}
    assert_close(change(made, tmp_path / "out"), {name: torch.as_tensor(each) for name, each in want.items()})
    assert done.rank == 7
    assert done.error is not None
    assert done.error < 1e-6


def test_an_adapter_that_does_not_change_a_module_counts_as_one_that_changes_it_by_nothing(
    made: Path, tmp_path: Path
) -> None:
    merged(made, tmp_path / "out", method="average")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    name = "encoder.layers.0.self_attn.v_proj"
    assert config["rank_pattern"][name] == 7
    parts = changes_of(made, KINDS)
    weight = f"{VISION}{name}.weight"
    want = (parts[0][weight] + parts[2][weight]) / 3
    torch.testing.assert_close(change(made, tmp_path / "out")[weight], want, atol=CLOSE, rtol=0)


def cores(
    folder: Path, names: Mapping[str, Any], space: str
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Coordinates from decompositions of whole matrices in float64, and the bases to lift them with."""
    parts = changes_of(folder, names)
    found: list[dict[str, Tensor]] = [{} for _ in parts]
    bases: dict[str, Any] = {}
    for name in parts[0]:
        deltas = [part[name].flatten(1) for part in parts if part[name].abs().max() > 1e-6]
        if not deltas:
            continue
        every = [part[name].flatten(1) for part in parts]
        if space == "knots":
            u, values, v = torch.linalg.svd(torch.cat(every, 1), full_matrices=False)
            kept = int((values > 1e-5 * values[0]).sum())
            bases[name] = u[:, :kept], None
            own = (values[:kept, None] * v[:kept]).split(every[0].shape[1], dim=1)
        else:
            pairs = [factors(folder / each, name) for each in names]
            there = [each for each in pairs if each is not None]
            u = torch.linalg.svd(torch.cat([b for b, _ in there], 1), full_matrices=False)[0]
            v = torch.linalg.svd(torch.cat([a for _, a in there]), full_matrices=False)[2]
            bases[name] = u, v
            own = [u.T @ each @ v.T for each in every]
        for core, each in zip(found, own, strict=True):
            core[name] = each
    return found, bases


def factors(folder: Path, weight: str) -> tuple[Tensor, Tensor] | None:
    """B and A of a linear layer."""
    stored = load_file(folder / "adapter_model.safetensors")
    lead = f"base_model.model.{weight.removeprefix(VISION).removesuffix('weight')}lora_"
    if f"{lead}A.weight" not in stored:
        return None
    return stored[f"{lead}B.weight"].double(), stored[f"{lead}A.weight"].double()


@pytest.mark.parametrize("space", ["core", "knots"])
def test_other_methods_merge_what_whole_decompositions_give(made: Path, tmp_path: Path, space: str) -> None:
    names = {name: made / name for name in ("plain", "stabilized")}
    settings = {"density": 0.3, "scaling_factor": 0.8, "trim": "tensor"}
    merged(made, tmp_path / "out", names, method="ties", settings=settings, space=space)
    tuned, bases = cores(made, names, space)
    base = {name: torch.zeros_like(each) for name, each in tuned[0].items()}
    core = ties(base, tuned, scaling_factor=0.8, density=0.3, aggregate="sum", trim="tensor")
    got = change(made, tmp_path / "out")
    assert core
    for name, (left, right) in bases.items():
        want = left @ core[name] if right is None else left @ core[name] @ right
        torch.testing.assert_close(got[name], want, atol=CLOSE, rtol=0, msg=name)


@pytest.mark.parametrize("method", ["ties", "tsv_m", "iso_c"])
def test_peft_gives_our_logits(made: Path, tmp_path: Path, method: str) -> None:
    merged(made, tmp_path / "out", method=method)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs: Any = PeftModel.from_pretrained(tower(), str(tmp_path / "out")).eval()
    ours = CLIPVisionModel(tower().config).eval()
    state = read(made / "base.safetensors", tmp_path / "out")
    ours.load_state_dict({name.removeprefix(VISION): each for name, each in state.items()})
    with torch.no_grad():
        got, want = theirs(pixel_values=images).pooler_output, ours(pixel_values=images).pooler_output
    torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", ["plain", "stabilized", "embeddings", "linearized"])
def test_one_adapter_averaged_is_the_same_function_of_the_same_rank(
    made: Path, tmp_path: Path, name: str
) -> None:
    done = merged(made, tmp_path / "out", {name: made / name}, method="average")
    assert_close(
        read(made / "base.safetensors", tmp_path / "out"), read(made / "base.safetensors", made / name)
    )
    assert done.rank == {"plain": 4, "stabilized": 3, "embeddings": 3, "linearized": 8}[name]


def test_the_same_adapter_twice_has_its_own_rank(made: Path, tmp_path: Path) -> None:
    names = {"one": made / "plain", "other": made / "plain"}
    assert merged(made, tmp_path / "out", names, method="average").rank == 4
    assert_close(change(made, tmp_path / "out"), changes_of(made, {"plain": 0})[0])


def test_an_adapter_that_was_not_trained_adds_nothing(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plain", tmp_path / "new")
    rewrite(tmp_path / "new", lambda all_of_it: {k: v * ("lora_A" in k) for k, v in all_of_it.items()})
    merged(made, tmp_path / "out", {"new": tmp_path / "new", "plain": made / "plain"}, method="task_arithmetic",
           settings={"scaling_factor": 1.0})  # fmt: skip
    assert_close(change(made, tmp_path / "out"), changes_of(made, {"plain": 0})[0])
    done = merged(made, tmp_path / "none", {"new": tmp_path / "new"}, method="average")
    assert (done.rank, done.error) == (1, 0.0)
    assert_close(
        change(made, tmp_path / "none"), {k: v * 0 for k, v in change(made, tmp_path / "out").items()}
    )


def test_a_rank_keeps_the_largest_singular_values_and_says_what_is_lost(made: Path, tmp_path: Path) -> None:
    merged(made, tmp_path / "whole", method="average")
    done = merged(made, tmp_path / "cut", method="average", rank=2)
    assert done.rank == 2
    whole, got = change(made, tmp_path / "whole"), change(made, tmp_path / "cut")
    lost = norm = 0.0
    for name, each in whole.items():
        u, values, v = torch.linalg.svd(
            each.flatten(1) if each.dim() > 1 else each[None], full_matrices=False
        )
        want = ((u[:, :2] * values[:2]) @ v[:2]).view(each.shape)
        torch.testing.assert_close(got[name], want, atol=CLOSE, rtol=0, msg=name)
        lost, norm = lost + float(values[2:].square().sum()), norm + float(values.square().sum())
    assert done.error == pytest.approx(math.sqrt(lost / norm), rel=1e-4)
    about = inspection.info(tmp_path / "cut")
    assert about.adapter["rank"] == "2"
    assert about.adapter["error"] == f"{done.error:.6g} of the merged change"


@pytest.mark.parametrize("space", ["core", "knots"])
def test_whole_weights_of_a_merge_in_coordinates_are_the_base_with_the_adapter(
    made: Path, tmp_path: Path, space: str
) -> None:
    merged(made, tmp_path / "adapter", method="ties", space=space)
    done = merged(made, tmp_path / "m.safetensors", method="ties", space=space, as_adapter=False)
    assert_close(load_file(tmp_path / "m.safetensors"), read(made / "base.safetensors", tmp_path / "adapter"))
    assert done.rank is None
    assert done.tensors == len(load_file(made / "base.safetensors"))
    merged(made, tmp_path / "folder", method="ties", space=space, as_adapter=False, dtype="bfloat16")
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    assert {each.dtype for each in stored.values()} == {torch.bfloat16}
    assert_close(
        stored, {name: each.bfloat16() for name, each in load_file(tmp_path / "m.safetensors").items()}
    )


@pytest.mark.parametrize(("dtype", "want"), [("same", torch.float16), ("bfloat16", torch.bfloat16)])
def test_factors_have_the_dtype_of_all_adapters_or_the_one_asked_for(
    made: Path, tmp_path: Path, dtype: str, want: torch.dtype
) -> None:
    for name in ("plain", "stabilized"):
        shutil.copytree(made / name, tmp_path / name)
        rewrite(tmp_path / name, lambda tensors: {key: each.half() for key, each in tensors.items()})
    names = {name: tmp_path / name for name in ("plain", "stabilized")}
    done = merged(made, tmp_path / "out", names, method="average", dtype=dtype)
    assert {each.dtype for each in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        want
    }
    merged(made, tmp_path / "exact", names, method="average", dtype="float32")
    exact, got = change(made, tmp_path / "exact"), change(made, tmp_path / "out")
    lost = math.sqrt(sum(float((got[name] - each).square().sum()) for name, each in exact.items()))
    norm = math.sqrt(sum(float(each.square().sum()) for each in exact.values()))
    assert done.error == pytest.approx(lost / norm, rel=0.05)
    mixed = {"plain": tmp_path / "plain", "embeddings": made / "embeddings"}
    merged(made, tmp_path / "mixed", mixed, method="average")
    assert {each.dtype for each in load_file(tmp_path / "mixed" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_a_dora_is_merged_dense_and_cut_with_the_error_said(made: Path, tmp_path: Path, run: Run) -> None:
    models = [made / "dora", made / "plain"]
    arguments = ["merge", "--base", made / "base.safetensors", *models, "--method", "average", "--as-adapter"]
    ended = run(*arguments, "-o", "out", "--json")
    told = json.loads(ended.out)
    assert ended.err == (
        "note: the merge is dense, and then cut to an adapter: `dora` is a DoRA, whose change is not of low rank\n"
        f"note: the adapter has rank 8; its distance to the merge is {told['error']:.2%} of the merged change\n"
    )
    parts = changes_of(made, {"dora": 0, "plain": 0})
    want = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    got = change(made, tmp_path / "out")
    lost = math.sqrt(sum(float((got[name] - each).square().sum()) for name, each in want.items()))
    norm = math.sqrt(sum(float(each.square().sum()) for each in want.values()))
    assert told["error"] == pytest.approx(lost / norm, rel=1e-3)
    assert told["rank"] == 8
    refused = run(*arguments, "--set", "space=core", "-o", "refused")
    assert (refused.status, refused.err) == (3, (
        'error: space = "core" is for LoRA adapters:\n'
        "  `dora` is a DoRA, whose change is not of low rank\n"
        'hint: use `space = "dense"`, whose result `--as-adapter` cuts to a rank\n'
    ))  # fmt: skip
    assert not (tmp_path / "refused").exists()


def test_a_fine_tuned_model_among_adapters_needs_a_rank_and_is_cut_as_extract_cuts(
    made: Path, tmp_path: Path
) -> None:
    state = load_file(made / "base.safetensors")
    linear = {
        name: each + 0.1 if each.dim() == 2 and "layers" in name else each for name, each in state.items()
    }
    save_file(linear, tmp_path / "tuned.safetensors")
    names = {"tuned": tmp_path / "tuned.safetensors", "plain": made / "plain"}
    with pytest.raises(
        UsageError, match="rank: is missing: `tuned` is no adapter, and has no rank of its own"
    ):
        merged(made, tmp_path / "out", names, method="average")
    done = merged(made, tmp_path / "out", names, method="average", rank=3)
    merged(made, tmp_path / "dense.safetensors", names, method="average", as_adapter=False)
    want = extract(
        tmp_path / "dense.safetensors", base=made / "base.safetensors", rank=3, output=tmp_path / "want"
    )
    assert_close(change(made, tmp_path / "out"), change(made, tmp_path / "want"))
    assert done.error == pytest.approx(want.error, rel=1e-4)


def test_a_method_that_must_see_whole_weights_says_so(made: Path, tmp_path: Path, run: Run) -> None:
    models = [made / name for name in KINDS]
    arguments = ["merge", "--base", made / "base.safetensors", *models, "--as-adapter", "-o", "out"]
    dense = run(*arguments, "--method", "dc_merge")
    assert dense.status == 0, dense.err
    assert (
        "note: the merge is dense, and then cut to an adapter: `dc_merge` merges queries, keys and values"
        in dense.err
    )
    refused = run(*arguments, "--method", "fisher", "--set", "space=knots")
    assert refused.status == 2
    assert 'error: space = "knots": `fisher` looks at images' in refused.err
    several = run(*arguments, "--method", "emr")
    assert several.status == 2
    assert "as_adapter: `emr` writes more than one tower, and an adapter changes one" in several.err


def test_an_adapter_on_another_base_is_not_merged_in_coordinates_of_this_one(
    made: Path, tmp_path: Path
) -> None:
    other = write_tower(tmp_path / "other.safetensors", tower(7))
    names = {"a": {"source": str(other), "adapter": str(made / "plain")}, "b": made / "plain"}
    with pytest.raises(InputError, match="`a` is added to another base"):
        merged(made, tmp_path / "out", names, method="average", space="core")
    same = shutil.copy(made / "base.safetensors", tmp_path / "same.safetensors")
    merged(made, tmp_path / "out", {**names, "a": {"source": str(same), "adapter": str(made / "plain")}}, method="average",
           space="core")  # fmt: skip


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
@pytest.mark.parametrize("biases", [{"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}])
def test_biases_are_merged_and_stay_whole(
    made: Path, tmp_path: Path, space: str, biases: dict[str, Any]
) -> None:
    write_adapter(tmp_path / "biased", 3, **PLAIN, **biases)
    names = {"biased": tmp_path / "biased", "stabilized": made / "stabilized"}
    done = merged(made, tmp_path / "out", names, method="average", space=space)
    parts = changes_of(made, {str(tmp_path / "biased"): 0, "stabilized": 0})
    want = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert_close(change(made, tmp_path / "out"), want)
    assert_close(read(made / "base.safetensors", tmp_path / "out"), merged_by_peft(tmp_path / "out"), 1e-6)
    assert done.error is not None
    assert done.error < 1e-6
    merged(made, tmp_path / "m.safetensors", names, method="average", space=space, as_adapter=False)
    assert_close(load_file(tmp_path / "m.safetensors"), read(made / "base.safetensors", tmp_path / "out"))


def test_whole_modules_are_told(made: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "saved", 3, **PLAIN, modules_to_save=["post_layernorm"])
    with pytest.raises(
        InputError, match=r"`saved` has whole tensors: `vision_model\.post_layernorm\.weight`"
    ):
        merged(made, tmp_path / "out", {"saved": tmp_path / "saved"}, method="average", space="core")
    done = merged(made, tmp_path / "out", {"saved": tmp_path / "saved"}, method="average")
    assert done.error is not None
    assert done.error > 0.01


def test_nan_in_an_adapter_names_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plain", tmp_path / "bad")
    rewrite(tmp_path / "bad", lambda tensors: {key: each.fill_(math.nan) for key, each in tensors.items()})
    with pytest.raises(
        InputError, match=r"bad: the factors of `vision_model\..*q_proj\.weight` have NaN or infinity"
    ):
        merged(made, tmp_path / "out", {"bad": tmp_path / "bad", "plain": made / "plain"}, method="ties")
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_the_dtype_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plain", tmp_path / "large")
    configure(tmp_path / "large", lora_alpha=1e12)
    with pytest.raises(InputError, match=r"the merged values do not fit float16"):
        merged(made, tmp_path / "out", {"large": tmp_path / "large"}, method="average", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_refused(made: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "model").mkdir()
    write_tower(tmp_path / "model" / "model.safetensors")
    start = ["merge", "--base", made / "base.safetensors", made / "plain", "--method", "average"]
    for more, status, message in (
        (["--as-adapter", "-o", "a.safetensors"], 2, "error: a.safetensors: an adapter is a folder\n"),
        (["--as-adapter", "-o", "lora.v2"], 2, "error: lora.v2: an adapter is a folder\n"),
        (["--as-adapter", "-o", "model"], 2, "error: model: has a `model.safetensors`, which would be read instead\n"),
        (["--as-adapter", "-o", made / "plain"], 2, "the output would replace an input (plain"),
        (["--rank", 4, "-o", "m.safetensors"], 2, "error: rank: is of an adapter, and the output is none\n"),
        (["--as-adapter", "--rank", 0, "-o", "out"], 2, "error: --rank: `rank`: expected a whole number, at least 1, got 0\n"),
        (["--as-adapter", "--shard-size", "1GB", "-o", "out"], 2, "error: --shard-size: an adapter is one file\n"),
        (["--set", "space=kore", "-o", "out"], 2, "expected one of dense, core, knots, got \"kore\" (did you mean `core`?)"),
        (["--as-adapter", "--sweep", "method.name=average", "-o", "out"], 2, "error: --as-adapter: a sweep writes whole weights\n"),
        (["--set", "as_adapter=yes", "-o", "out"], 2, "`as_adapter`: expected true or false, got \"yes\""),
    ):  # fmt: skip
        ended = run(*start, *more)
        assert ended.status == status, ended.err
        assert message in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_whole_weights_of_adapters_warn_of_methods_that_are_published_below_the_mean(
    made: Path, tmp_path: Path
) -> None:
    with pytest.warns(MergecliWarning, match="`iso_c` of adapters is published below their mean"):
        merged(made, tmp_path / "m.safetensors", method="iso_c", as_adapter=False)
    with pytest.warns(MergecliWarning, match="`iso_c` of adapters is published below their mean"):
        merged(made, tmp_path / "out", method="lines", settings={"of": "iso_c"}, space="dense")


def test_a_recipe_says_the_same_and_the_adapter_says_the_recipe(made: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "r.toml").write_text(
        'base = "base.safetensors"\nas_adapter = true\nrank = 5\nspace = "knots"\n'
        '[tuned]\nplain = "plain"\nstabilized = "stabilized"\n[method]\nname = "ties"\n'
    )
    assert run("merge", "r.toml", "-o", "one").status == 0
    options = ["--method", "ties", "--as-adapter", "--rank", 5, "--set", "space=knots"]
    run("merge", "--base", "base.safetensors", "plain", "stabilized", *options, "-o", "two")
    (tmp_path / "again.toml").write_text(run("info", "one", "--recipe").out)
    assert run("merge", "again.toml", "-o", "three").status == 0
    one, two, three = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two", "three")
    )
    assert one == two == three
    assert sorted(one) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    known = recipe_of(tmp_path / "again.toml")
    assert (known.space, known.as_adapter, known.rank) == ("knots", True, 5)


def test_the_card_says_how_peft_loads_it(made: Path, tmp_path: Path) -> None:
    merged(made, tmp_path / "out", method="ties")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: adapter\nlibrary_name: peft\n" in card
    assert "A LoRA adapter of a CLIP vision tower, merged from 3 fine-tuned models by `ties`" in card
    assert 'tower = PeftModel.from_pretrained(base, "FOLDER")' in card
    assert 'space = "core"\nas_adapter = true\n' in card
    assert "None yet. `mergecli eval FOLDER --recipe RECIPE` evaluates the base with the adapter." in card
    merged(made, tmp_path / "none", method="ties", card=False)
    assert not (tmp_path / "none" / "README.md").exists()


def test_a_sweep_of_a_recipe_for_an_adapter_is_refused(made: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "r.toml").write_text(
        'base = "base.safetensors"\nas_adapter = true\nspace = "knots"\n[tuned]\nplain = "plain"\nstabilized = "stabilized"\n'
    )
    sweep = ["merge", "r.toml", "--sweep", "method.name=ties,average", "-o", "swept"]
    refused = run(*sweep)
    assert refused.status == 2
    assert refused.err.startswith("error: as_adapter: a sweep makes whole weights\n")
    assert run(*sweep, "--set", "as_adapter=false").status == 0
    run("merge", "r.toml", "--method", "ties", "-o", "one")
    want = read(tmp_path / "base.safetensors", tmp_path / "one")
    assert_close(load_file(tmp_path / "swept" / "ties.safetensors"), want)


def test_an_adapter_of_ours_is_merged_again_and_knows_its_base(made: Path, tmp_path: Path) -> None:
    merged(made, tmp_path / "one", method="average")
    merged(made, tmp_path / "two", {"one": tmp_path / "one"}, method="average")
    assert_close(change(made, tmp_path / "two"), change(made, tmp_path / "one"))
    write_tower(tmp_path / "base.safetensors", tower(9))
    with pytest.raises(InputError, match="is an adapter for another base"):
        merged(tmp_path, tmp_path / "three", {"one": tmp_path / "one"}, method="average")


def test_a_dry_run_plans_the_adapter_and_writes_nothing(made: Path, tmp_path: Path, run: Run) -> None:
    models = [made / name for name in KINDS]
    arguments = [
        "merge",
        "--base",
        made / "base.safetensors",
        *models,
        "--method",
        "ties",
        "--as-adapter",
        "-o",
        "out",
    ]
    ended = run(*arguments, "--dry-run", "--json")
    assert ended.status == 0, ended.err
    (written,) = [
        each for each in json.loads(ended.out)["work"] if each["work"] == "write" and "bytes" in each
    ]
    assert not list(tmp_path.iterdir())
    run(*arguments)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "ties in core space" in [each["what"] for each in json.loads(ended.out)["work"]]
    assert "\nspace\tcore\n" in run("info", "out").out
    assert written["tensors"] == len(stored)
    assert written["bytes"] == sum(each.nbytes for each in stored.values())
