"""Settings by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli import methods
from mergecli.merging.merge import merge
from mergecli.merging.models import ModelPasses
from mergecli.methods import SettingsError
from mergecli.methods._layers import kind_of, matcher
from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.ties import ties
from tests.support.layered_world import DEPTHS
from tests.support.merging import merged, with_integers

NAMES = [
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.pre_layrnorm.weight",
    "vision_model.encoder.layers.0.layer_norm1.bias",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "vision_model.encoder.layers.3.mlp.fc1.weight",
    "vision_model.encoder.layers.4.mlp.fc2.bias",
    "vision_model.encoder.layers.13.mlp.fc1.weight",
    "vision_model.post_layernorm.bias",
]
FC, NORM, OUT = "encoder.layers.0.fc.weight", "encoder.layers.1.norm.weight", "encoder.layers.2.out.weight"


@pytest.mark.parametrize(
    ("pattern", "which"),
    [
        ("*", range(9)),
        ("vision_model.embeddings.class_embedding", [0]),
        ("embeddings.class_embedding", [0]),
        ("vision_model.embeddings", [0, 1]),
        ("*.layers.{0-3}.mlp.*", [5]),
        ("*.layers.{0-3,13}.*", [3, 4, 5, 7]),
        ("*.layers.{4-}", [6, 7]),
        ("*.layers.?.mlp", [5, 6]),
        ("*.{fc1,q_proj}.*", [4, 5, 7]),
        ("*.layers.[!34].*", [3, 4]),
        ("{3-4}", [5, 6]),
        ("{0-3}.mlp", [5]),
        ("{0}.norm", [3]),
        ("embedding", [0, 1]),
        ("norm", [2, 3, 8]),
        ("attention", [4]),
        ("mlp", [5, 6, 7]),
        ("fc1", []),
    ],
)
def test_a_pattern_matches_names_globs_ranges_and_kinds(pattern: str, which: Any) -> None:
    assert [name for name in NAMES if matcher(pattern)(name)] == [NAMES[number] for number in which]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("visual.transformer.resblocks.3.ln_1.weight", "norm"),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "attention"),
        ("visual.transformer.resblocks.3.mlp.c_fc.weight", "mlp"),
        ("visual.conv1.weight", "embedding"),
        ("visual.positional_embedding", "embedding"),
        ("vit.encoder.layer.0.attention.output.dense.bias", "attention"),
        ("vit.encoder.layer.0.intermediate.dense.bias", "mlp"),
        ("embeddings.LayerNorm.weight", "norm"),
        ("visual.proj", None),
    ],
)
def test_kinds_are_read_from_the_names_of_several_libraries(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("", "is empty"),
        ("*.{3-1}", "the range 3-1 ends before it begins"),
        ("*.{0-99999}", "the range 0-99999 has more than 1,000 layers"),
        ("*.{0-3", "has an unpaired brace; ranges of layers are `{0-3}`"),
        ("*.{}", "has a brace with nothing in it; ranges of layers are `{0-3}`"),
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern: str, what: str) -> None:
    with pytest.raises(SettingsError) as error:
        methods.create("ties", {"layers": [{"match": pattern}]})
    assert error.value.problems == (("layers[0].match", f"`{pattern}`: {what}"),)


def test_each_layer_has_its_settings_and_the_first_line_that_matches_wins(layered: World) -> None:
    """Against plain torch: theta_0 + lambda_l sum_i tau_i, or a copy."""
    lines = [
        {"match": [FC, NORM], "scaling_factor": 0.1},
        {"match": "norm", "keep": "base"},
        {"match": "encoder.layers.2", "keep": "t2"},
        {"match": "encoder.*", "scaling_factor": {"first": 0.2, "last": 0.6}},
        {"match": "e*", "scaling_factor": -1.0},
    ]
    scale = dict.fromkeys(DEPTHS, 0.3) | {FC: 0.1, NORM: 0.1, "post_layernorm.weight": 0.0}
    scale |= {"encoder.layers.0.fc.bias": 0.2, "encoder.layers.1.fc.weight": 0.4, "empty": -1.0}
    scale |= {name: -1.0 for name in DEPTHS if name.startswith("embeddings")}
    base, tuned = layered.base, layered.tuned
    want = {
        name: base[name] + scale[name] * sum(each[name] - base[name] for each in tuned.values())
        for name in scale
    }
    want[OUT] = tuned["t2"][OUT]
    assert_same(merged(layered, "task_arithmetic", layers=lines), with_integers(want, layered), atol=1e-6)
    got = merged(layered, "average", layers=[{"match": "norm", "keep": "base"}, {"match": OUT, "keep": "t2"}])
    assert got[NORM].equal(base[NORM]), "a copy is exact, also for a method that needs no base"
    assert got[OUT].equal(tuned["t2"][OUT])


def test_a_layer_has_what_a_merge_of_the_whole_model_with_its_settings_gives_it(layered: World) -> None:
    lines = [{"match": FC, "density": 0.5}, {"match": OUT, "density": 0.05, "scaling_factor": 0.7}]
    want = ties(layered.base, [*layered.tuned.values()], 0.3, 0.2, "sum")
    for line, name in zip(lines, (FC, OUT), strict=True):
        alone = ties(
            layered.base, [*layered.tuned.values()], line.get("scaling_factor", 0.3), line["density"], "sum"
        )
        want[name] = alone[name]
    assert_same(merged(layered, "ties", layers=lines), with_integers(want, layered), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ties", {"scaling_factor": 0.4}),
        ("dare", {"of": {"name": "ties", "density": 0.5}}),
        ("dc_merge", {"smoothing": "mean"}),
        ("weighted_average", {"weights": [1, 2, 3]}),
    ],
)
def test_the_same_settings_in_every_layer_give_the_same_file(
    layered: World, method: str, settings: dict[str, Any]
) -> None:
    files = [layered.folder / "plain.safetensors", layered.folder / "layers.safetensors"]
    lines = [{"match": name, **settings} for name in DEPTHS]
    for file, more in zip(files, ({}, {"layers": lines}), strict=True):
        merge(layered.files, base=layered.base_file, method=method, settings=settings | more, output=file)
    assert files[0].read_bytes() == files[1].read_bytes()
    other = {**settings, "layers": [*lines, {"match": "scale", "keep": "base"}]}
    with pytest.raises(UsageError) as error:
        merge(layered.files, base=layered.base_file, method=method, settings=other, output=files[1])
    assert error.value.message == (
        "`method.layers[10].match`: the lines before it match every tensor that it matches"
    )


def test_many_lines_share_the_passes_of_one_merge(layered: World, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    run = ModelPasses.run

    def counted(self: ModelPasses, what: str, *rest: Any) -> Iterator[Any]:
        passes.append(what)
        return run(self, what, *rest)

    monkeypatch.setattr(ModelPasses, "run", counted)
    want = merged(layered, "ties")
    once = passes.copy()
    passes.clear()
    lines = [{"match": name, "scaling_factor": 0.3 + number} for number, name in enumerate(list(DEPTHS)[:-1])]
    got = merged(layered, "ties", layers=[*lines, {"match": "*", "scaling_factor": 0.3}])
    assert passes == once == ["surveying", "surveying", "merging"]
    assert got["scale"].equal(want["scale"])


def test_gradients_of_whole_numbers_are_rounded_and_reach_into_another_method(layered: World) -> None:
    lines = [{"match": "encoder.*", "rank": {"first": 1, "last": 4}}]
    target = methods.create("dc_merge", {"layers": lines}, ("t1", "t2"))
    from mergecli.methods._layers import by_tensor, places

    found: Any = by_tensor(target, places(target.layers, list(DEPTHS)))
    assert [found[name].rank for name in (FC, "encoder.layers.1.fc.weight", OUT, "scale")] == [1, 2, 4, 0]
    line = {"match": "{0-1}", "of": {"density": {"first": 0.2, "last": 0.4}}}
    target = methods.create(
        "dare", {"of": {"name": "ties", "scaling_factor": 0.5}, "layers": [line]}, ("t1", "t2")
    )
    found = by_tensor(target, places(target.layers, list(DEPTHS)))
    assert (found[FC].of.density, found[NORM].of.density, found[OUT].of.density) == (
        0.2,
        pytest.approx(0.3),
        0.2,
    )
    assert found[NORM].of.scaling_factor == 0.5


def test_a_gradient_may_be_within_a_list() -> None:
    line = {"match": "mlp", "weights": [{"first": 1, "last": 2}, 3]}
    method: Any = methods.create("weighted_average", {"weights": [1, 1], "layers": [line]}, ("a", "b"))
    assert (method.layers[0].first.weights, method.layers[0].last.weights) == ((1, 3), (2, 3))


@pytest.mark.parametrize(
    ("method", "lines", "key", "what"),
    [
        ("ties", 3, "layers", "expected a list of tables, got 3"),
        ("ties", [{}], "layers[0].match", 'expected a pattern such as "*.layers.{0-3}.mlp.*", got nothing'),
        ("ties", [{"match": 1}], "layers[0].match", 'expected a pattern such as "*.layers.{0-3}.mlp.*", got 1'),
        ("ties", [{"match": "mlp", "keep": "bas"}], "layers[0].keep",
         'expected "base" or a model (`t1`, `t2`), got "bas" (did you mean `base`?)'),
        ("ties", [{"match": "mlp", "keep": "t1", "density": 1}], "layers[0].density",
         "a line with `keep` copies weights, and has no settings"),
        ("ties", [{"match": "mlp", "density": 2}], "layers[0].density", "expected a number in (0, 1], got 2"),
        ("ties", [{"match": "mlp", "density": {"first": 0.1, "last": 2}}], "layers[0].density",
         "expected a number in (0, 1], got 2"),
        ("ties", [{"match": "mlp", "trim": {"first": "model", "last": "tensor"}}], "layers[0].trim",
         'a gradient goes from one number to another, got { first = "model", last = "tensor" }'),
        ("ties", [{"match": "mlp", "name": "average"}], "layers[0].name",
         "unknown setting; there are `scaling_factor`, `density`, `aggregate`, `trim`, `zero_sign`"),
        ("ada_merging", [{"match": "mlp", "steps": 3}], "layers[0].steps",
         "cannot differ by layer: `ada_merging` looks at images with it before it merges"),
        ("smile", [{"match": "mlp", "rank": 3}], "layers",
         "`smile` writes more than one tower, which has no settings by layer"),
        ("dop", [{"match": "mlp"}], "layers", "`dop` goes on from one merge to the next, which has no settings by layer"),
        ("dare", [{"match": "mlp", "of": {"name": "ties", "layers": []}}], "layers[0].of.layers",
         "settings by layer are those of the whole method: `[[method.layers]]`"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said(method: str, lines: object, key: str, what: str) -> None:
    with pytest.raises(SettingsError) as error:
        methods.create(method, {"layers": lines}, ("t1", "t2"))
    assert error.value.problems[0] == (key, what)


def test_a_chain_of_merges_has_no_settings_by_layer(layered: World) -> None:
    with pytest.raises(UsageError) as error:
        merge(
            layered.files, base=layered.base_file, onto=layered.base_file, method="task_arithmetic",
            settings={"layers": [{"match": "norm", "keep": "base"}]}, output=layered.folder / "chain.safetensors",
        )  # fmt: skip
    assert error.value.message == (
        "`method.layers`: a merge that others go on from has the same settings in every layer"
    )


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(layered: World) -> None:
    with pytest.raises(UsageError) as error:
        merged(layered, "ties", layers=[{"match": "encoder.layers.0.fc.wieght", "keep": "base"}])
    assert error.value.message == (
        "`method.layers[0].match`: no tensor that is merged matches `encoder.layers.0.fc.wieght` "
        "(did you mean `encoder.layers.0.fc.weight`?)"
    )
    with pytest.raises(UsageError) as error:
        merged(layered, "ties", layers=[{"match": "{7-9}", "keep": "base"}])
    assert error.value.message.endswith("matches `{7-9}`; there is `encoder.layers.1.fc.weight`")


def test_queries_keys_and_values_that_are_merged_as_one_matrix_have_the_same_settings(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    def model(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        names = [f"layers.{layer}.attn.{part}_proj.weight" for layer in (0, 1) for part in "qkv"]
        return {name: torch.randn(4, 4, generator=generator) for name in names}

    for seed, name in enumerate(("base", "a", "b")):
        save_file(model(seed), tmp_path / f"{name}.safetensors")
    tuned = {name: tmp_path / f"{name}.safetensors" for name in "ab"}

    def merge_with(lines: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        output = tmp_path / "m.safetensors"
        merge(
            tuned,
            base=tmp_path / "base.safetensors",
            method="dc_merge",
            settings={"layers": lines},
            output=output,
        )
        return load_file(output)

    with pytest.raises(UsageError) as error:
        merge_with([{"match": "*q_proj*", "scaling_factor": 0.5}])
    assert error.value.message == (
        "`method.layers`: `dc_merge` merges queries, keys and values as one matrix, and those of "
        "`layers.0.attn.qkv_proj.weight` have other settings each"
    )
    apart, fused = merge_with([{"match": "{0}", "fuse_qkv": False}]), merge_with([])
    name = "layers.{}.attn.k_proj.weight"
    assert apart[name.format(1)].equal(fused[name.format(1)])
    assert not apart[name.format(0)].equal(fused[name.format(0)])


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("task_arithmetic", "every setting may differ by layer"),
        ("ties", "every setting may differ by layer; the whole model is surveyed all the same, and what is applied to a layer "
         "differs. Each other value of `density`, `aggregate`, `trim`, `zero_sign` surveys the models once more"),
        ("ada_merging", "no setting differs by layer, but `keep` copies layers"),
        ("reg_mean", "`exclude`, `reduce_non_diagonal_ratio`, `ridge` may differ by layer"),
        ("emr", "nothing differs by layer: it writes more than one tower"),
    ],
)  # fmt: skip
def test_a_method_says_what_may_differ_by_layer(method: str, text: str) -> None:
    assert methods.about_layers(methods.find(method)) == text
