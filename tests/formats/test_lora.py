"""Adapters read as checkpoints equal what peft makes of them; those that do not fit are refused by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mergecli.formats import info as inspection
from mergecli.formats import lora_config
from mergecli.formats.lora_files import is_adapter
from mergecli.formats.opening import open_source
from mergecli.merging import merge as engine
from mergecli.merging import models as reading
from mergecli.merging.merge import merge
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import VISION, open_checkpoint
from mergecli.storage.sources import Source, parse_source
from tests.conftest import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape.*"),  # peft's own `lora_bias`
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True.*:UserWarning"),
]

ROUNDING = 5e-7
"""float32 sums of a few products of numbers around 1, in another order."""

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "rank-stabilized": {**PLAIN, "use_rslora": True},
    "other scaling": {**PLAIN, "lora_alpha": 5},
    "patterns": {
        **PLAIN,
        "target_modules": ["q_proj", "fc1"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.fc1": 3},
        "alpha_pattern": {r"encoder\.layers\.0\..*": 3, "^encoder.layers.1.mlp.fc1": 7},
    },
    "patterns, rank-stabilized": {**PLAIN, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "modules to save": {**PLAIN, "modules_to_save": ["post_layernorm", "fc2", "embeddings"]},
    "all biases": {**PLAIN, "bias": "all"},
    "all biases, modules to save": {**PLAIN, "bias": "all", "modules_to_save": ["post_layernorm", "fc2"]},
    "biases of its modules": {**PLAIN, "bias": "lora_only"},
    "bias of B": {**PLAIN, "lora_bias": True},
    "DoRA": {**PLAIN, "use_dora": True, "target_modules": ["q_proj", "fc1", "patch_embedding"]},
    "DoRA, rank-stabilized, patterns": {
        **PLAIN, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 3},
    },
    "convolution and embedding": {**PLAIN, "target_modules": ["patch_embedding", "position_embedding"]},
    "fan_in_fan_out, which linear layers do not have": {**PLAIN, "fan_in_fan_out": True, "target_modules": ["fc1"]},
    "a regular expression": {**PLAIN, "target_modules": r".*layers\.1.*\.(k_proj|fc2)"},
    "some layers, some modules excluded": {
        **PLAIN,
        "target_modules": ["q_proj", "fc1"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "exclude_modules": ["encoder.layers.1.mlp.fc1"],
    },
    "all linear layers": {**PLAIN, "target_modules": "all-linear"},
}  # fmt: skip


def tower(seed: int = 0, width: int = 16) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=8,
    )  # fmt: skip
    model = CLIPVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def write_tower(file: Path, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Path:
    state = (model or tower()).state_dict()
    save_file({VISION + name: tensor.contiguous().to(dtype) for name, tensor in state.items()}, file)
    return file


def write_adapter(folder: Path, seed: int = 1, **settings: Any) -> Path:
    """The folder with an adapter of random factors, as peft saves it."""
    adapter = get_peft_model(tower(), LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            trained = "lora_" in name or "modules_to_save.default" in name
            if trained or (name.endswith("bias") and parameter.requires_grad):
                # magnitudes are positive
                parameter.add_(torch.randn_like(parameter) * (0.05 if "magnitude" in name else 0.3))
    adapter.save_pretrained(str(folder))
    return folder


def merged_by_peft(folder: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    merged: Any = PeftModel.from_pretrained(model or tower(), str(folder)).merge_and_unload()
    return {VISION + name: tensor for name, tensor in merged.state_dict().items()}


def source(path: Path, adapter: Path | None = None, dtype: str | None = None) -> Source:
    found = parse_source(str(path), Path())
    return replace(found, adapter=source(adapter) if adapter else None, dtype=dtype)


def read(base: Path, adapter: Path, dtype: str | None = None) -> dict[str, Tensor]:
    with open_source(source(base, adapter, dtype)) as opened:
        return {name: opened.read(name) for name in opened.entries}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(dict(change(load_file(file))), file)


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tower(tmp_path / "base.safetensors")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", **PLAIN)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_on_its_base_is_what_peft_merges(tmp_path: Path, base: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "adapter", **CONFIGS[name])
    want = merged_by_peft(folder)
    before = load_file(base)
    assert any(not tensor.equal(before[key]) for key, tensor in want.items())
    assert_same(read(base, folder), want, atol=ROUNDING)


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


NAMES: dict[str, Callable[[str], str]] = {
    "of a tower inside of a model": lambda name: name.replace("model.encoder", "model.vision_model.encoder"),
    "with the adapter's own name": lambda name: name.replace(".weight", ".default.weight"),
    "without the wrapper's prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("names", NAMES)
def test_modules_are_found_by_names(base: Path, adapter: Path, names: str) -> None:
    want = read(base, adapter)
    rewrite(adapter, renamed(NAMES[names]))
    assert_same(read(base, adapter), want)


@pytest.mark.parametrize("names", NAMES)
def test_an_adapter_of_a_tower_fits_a_whole_clip(
    tmp_path: Path, adapter: Path, base: Path, names: str
) -> None:
    rewrite(adapter, renamed(NAMES[names]))
    own = load_file(base)
    others = {name.replace(VISION, "text_model."): tensor.clone() for name, tensor in own.items()}
    others["text_model.embeddings.token_embedding.weight"] = torch.ones(3, 2)
    save_file({**own, **others}, tmp_path / "clip.safetensors")
    with open_source(source(tmp_path / "clip.safetensors", adapter)) as whole:
        assert whole.is_whole_clip
        seen = whole.vision()
        assert_same({name: seen.read(name) for name in seen.entries}, read(base, adapter))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_keep_the_bases_dtype_or_take_the_sources_and_are_rounded_once(
    tmp_path: Path, adapter: Path, stored: torch.dtype
) -> None:
    base = write_tower(tmp_path / "half.safetensors", dtype=stored)
    wide = write_tower(tmp_path / "wide.safetensors", tower().to(stored))
    exact = read(wide, adapter)
    assert_same(read(base, adapter), {name: tensor.to(stored) for name, tensor in exact.items()})
    assert_same(read(base, adapter, "float32"), exact)
    half = {name: tensor.to(torch.float16) for name, tensor in exact.items()}
    assert_same(read(wide, adapter, "float16"), half)


def test_a_source_without_adapter_is_rounded(base: Path) -> None:
    with open_source(source(base, dtype="bfloat16")) as opened:
        got = {name: opened.read(name) for name in opened.entries}
    assert_same(got, {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base).items()})


@pytest.mark.parametrize(
    "name", ["plain", "DoRA", "modules to save", "bias of B", "convolution and embedding"]
)
def test_blocks_of_any_size_and_any_number_of_threads_give_the_same_bytes(
    tmp_path: Path, base: Path, name: str
) -> None:
    folder = write_adapter(tmp_path / "adapter", **CONFIGS[name])
    whole = read(base, folder)
    threads = torch.get_num_threads()
    try:
        for step, count in ((3, 1), (13, 4), (16, 2), (100, 1)):
            torch.set_num_threads(count)
            with open_source(source(base, folder)) as opened:
                for key, entry in opened.entries.items():
                    pieces = [
                        opened.read_entries(key, start, min(start + step, entry.size))
                        for start in range(0, entry.size, step)
                    ]
                    assert torch.cat(pieces).equal(whole[key].flatten()), key
    finally:
        torch.set_num_threads(threads)


def test_a_block_needs_only_its_rows(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(source(base, adapter)) as opened:
        tower = opened.sources[0]  # type: ignore[attr-defined]
        read_entries, asked = type(tower).read_entries, []
        monkeypatch.setattr(
            type(tower), "read_entries",
            lambda self, *args, **more: (asked.append(args) if self is tower else None)
            or read_entries(self, *args, **more),
        )  # fmt: skip
        name = f"{VISION}encoder.layers.0.self_attn.q_proj.weight"
        opened.read_entries(name, 5 * 16 + 3, 6 * 16 + 1)
    assert asked == [(name, 0, 8 * 16)]


def test_its_digest_is_that_of_a_file_with_the_same_content(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    save_file(read(base, adapter), tmp_path / "dense.safetensors")
    with (
        open_source(source(base, adapter)) as opened,
        open_checkpoint(tmp_path / "dense.safetensors") as dense,
    ):
        assert opened.digest() == dense.digest()
        assert adapter / "adapter_model.safetensors" in opened.files


class Linearized(nn.Module):
    """A LoRA layer replaced by its first-order expansion around its factors as they were."""

    def __init__(self, layer: Any, expansion: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.expansion = layer, expansion

    def forward(self, x: Tensor) -> Tensor:
        now = dict(self.layer.named_parameters())
        step = {name: now[name] - value for name, value in self.expansion.items()}
        value, derivative = torch.func.jvp(
            lambda factors: torch.func.functional_call(self.layer, factors, (x,)), (self.expansion,), (step,)
        )
        return value + derivative


def write_linearized(folder: Path, **settings: Any) -> nn.Module:
    """The published layout of a linearized adapter in the folder, and the tower that it means."""
    torch.manual_seed(3)
    model: Any = get_peft_model(tower(), LoraConfig(**settings))
    stored: dict[str, Tensor] = {}
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            factors = {key: each.detach() for key, each in layer.named_parameters() if "lora_" in key}
            for each in factors.values():
                each.normal_(std=0.3)
            expansion = {key: each + 0.3 * torch.randn_like(each) for key, each in factors.items()}
            stored |= {f"{name}.model.{key}": each for key, each in factors.items()}
            stored |= {
                f"{name}.params0_values.{2 + place}": each for place, each in enumerate(expansion.values())
            }
            model.set_submodule(name, Linearized(layer, expansion))
    folder.mkdir()
    save_file(stored, folder / "linearized_adapter_model.safetensors")
    config = {**settings, "peft_type": "LORA", "base_model_name_or_path": "org/clip"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated.*:DeprecationWarning")  # jvp's own
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_linearized_adapter_merged_by_its_closed_form_is_the_tower_of_jacobian_vector_products(
    tmp_path: Path, base: Path, rank_stabilized: bool
) -> None:
    settings = {**PLAIN, "use_rslora": rank_stabilized}
    want = write_linearized(tmp_path / "adapter", **settings)
    dense = tower()
    dense.load_state_dict(
        {name.removeprefix(VISION): value for name, value in read(base, tmp_path / "adapter").items()}
    )
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        got, expected, plain = (each(x).last_hidden_state for each in (dense.eval(), want, tower().eval()))
    assert (got - plain).abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_linearized_adapter_of_layers_without_bias_has_other_numbers(tmp_path: Path, base: Path) -> None:
    write_linearized(tmp_path / "adapter", **PLAIN)
    want = read(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "linearized_adapter_model.safetensors"
    shift = str.maketrans("23", "12")
    save_file(
        {
            name if "params0" not in name else name[:-1] + name[-1].translate(shift): tensor
            for name, tensor in load_file(file).items()
        },
        file,
    )
    assert_same(read(base, tmp_path / "adapter"), want)


@pytest.mark.parametrize("block", [50, 1 << 18])
def test_merging_adapters_is_merging_the_dense_towers_of_peft(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    adapters = {
        name: write_adapter(tmp_path / name, seed, **PLAIN) for seed, name in enumerate(("a", "b"), 5)
    }
    dense = {name: tmp_path / f"{name}.safetensors" for name in adapters}
    for name, file in dense.items():
        save_file(merged_by_peft(adapters[name]), file)
    outputs = [tmp_path / "from-adapters.safetensors", tmp_path / "from-dense.safetensors"]
    for models, output in zip((adapters, dense), outputs, strict=True):
        merge(models, base=base, method="task_arithmetic", settings={"scaling_factor": 0.4}, output=output)
    assert_same(load_file(outputs[0]), load_file(outputs[1]), atol=ROUNDING)
    whole = tmp_path / "whole.safetensors"
    monkeypatch.setattr(reading, "BLOCK", 1 << 18)
    merge(adapters, base=base, method="task_arithmetic", settings={"scaling_factor": 0.4}, output=whole)
    assert whole.read_bytes() == outputs[0].read_bytes()


def test_the_record_of_a_merge_has_the_digest_of_base_and_adapter_together(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    done = merge({"a": adapter, "b": adapter}, base=base, method="average", output=tmp_path / "m.safetensors")
    save_file(read(base, adapter), tmp_path / "dense.safetensors")
    with open_checkpoint(tmp_path / "dense.safetensors") as dense:
        assert done.inputs["a"] == dense.digest()


def test_an_adapters_file_is_never_replaced(base: Path, adapter: Path) -> None:
    with pytest.raises(engine.UsageError, match="would replace an input"):
        merge({"a": adapter}, base=base, method="average", output=adapter / "adapter_model.safetensors")


def test_info_says_what_an_adapter_is_without_its_base(adapter: Path) -> None:
    found = inspection.info(adapter)
    assert (found.kind, found.parameters) == ("adapter", 2 * 2 * 2 * 4 * 16)
    assert found.adapter == {"adapter": "LoRA", "rank": "4", "scaling": "2", "modules": "4 (q_proj, v_proj)"}
    assert inspection.info(adapter / "adapter_model.safetensors").adapter == found.adapter


def test_a_folder_that_holds_a_model_too_is_read_as_the_model(base: Path, adapter: Path) -> None:
    assert is_adapter(adapter)
    shutil.copy(base, adapter / "model.safetensors")
    assert not is_adapter(adapter)


def test_an_adapter_without_a_base_asks_for_one(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match="is an adapter, and there is no base") as caught:
        open_source(source(adapter))
    assert "--base" in caught.value.hint
    with pytest.raises(InputError, match="is an adapter, weights were expected"):
        open_source(source(adapter), source(adapter))
    with pytest.raises(InputError, match="is an adapter itself, and has `adapter` too"):
        open_source(source(adapter, adapter), source(tmp_path / "base.safetensors"))
    with pytest.raises(InputError, match="is an adapter, not a checkpoint"):
        open_checkpoint(adapter)


Q = "base_model.model.encoder.layers.0.self_attn.q_proj."
REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "loha": ({"peft_type": "LOHA"}, r'`peft_type`: expected "LORA", got "LOHA"'),
    "qalora": ({"use_qalora": True}, "is not a plain LoRA: `use_qalora = true`"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, r"`alora_invocation_tokens = \[1\]`"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "`use_bdlora = "),
    "parameters": ({"target_parameters": ["x"]}, "`target_parameters = "),
    "tokens": ({"trainable_token_indices": [1]}, "`trainable_token_indices = "),
    "layers twice": ({"layer_replication": [[0, 1]]}, "`layer_replication = "),
    "of the future": ({"use_novelty": 1}, "`use_novelty = 1`"),
    "pissa": ({"init_lora_weights": "pissa"}, "training has changed the base's weights too"),
    "rank of text": ({"r": "four"}, '`r`: expected a whole number, at least 1, got "four"'),
    "no rank": ({"r": None}, "`r`: expected a whole number"),
    "no alpha": ({"lora_alpha": None}, "`lora_alpha`: expected a number"),
    "ranks of text": ({"rank_pattern": {"q_proj": "x"}}, "`rank_pattern`: expected a whole number"),
    "no table": ({"alpha_pattern": [1]}, "`alpha_pattern`: expected a table"),
    "no expression": ({"target_modules": "("}, r"`target_modules`: expected a regular expression \("),
    "no names": ({"modules_to_save": [3]}, "`modules_to_save`: expected a list of names"),
    "no flag": ({"use_rslora": "yes"}, "`use_rslora`: expected true or false"),
    "no bias": ({"bias": "some"}, "`bias`: expected one of none, all, lora_only"),
    "another rank": ({"r": 8}, "`lora_A` has shape \\(4, 16\\), the configuration says rank 8"),
    "another rank of some": ({"rank_pattern": {"v_proj": 2}}, "v_proj`: `lora_A` has shape .* says rank 2"),
    "no DoRA": ({"use_dora": True}, "q_proj`: lacks `lora_magnitude_vector`"),
    "fewer modules": (
        {"target_modules": ["q_proj"]},
        "factors for `.*v_proj`, which its `target_modules` do not",
    ),
    "more modules": (
        {"target_modules": ["q_proj", "v_proj", "fc1"]},
        "lacks factors for `encoder.layers.0.mlp.fc1`",
    ),
    "saved modules": ({"modules_to_save": ["post_layernorm"]}, "lacks `post_layernorm.bias`, which its"),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_a_configuration_that_cannot_be_followed_is_refused_by_name(
    base: Path, adapter: Path, name: str
) -> None:
    settings, message = REFUSED_SETTINGS[name]
    configure(adapter, **settings)
    with pytest.raises(InputError, match=message):
        read(base, adapter)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "an A without a B": (without(f"{Q}lora_B.weight"), "encoder.layers.0.self_attn.q_proj`: lacks `lora_B`"),
    "a B without an A": (without(f"{Q}lora_A.weight"), "encoder.layers.0.self_attn.q_proj`: lacks `lora_A`"),
    "an extra tensor": (lambda old: {**old, "a.b.weight": torch.ones(2)}, "has an extra tensor `a.b.weight`"),
    "a bias": (lambda old: {**old, f"{Q}base_layer.bias": torch.ones(16)}, "extra tensor `.*base_layer.bias`"),
    "what was before a module that is not saved": (
        lambda old: {**old, "base_model.model.post_layernorm.original_module.bias": torch.ones(16)},
        "extra tensor `.*post_layernorm.original_module.bias`",
    ),
    "a magnitude": (
        lambda old: {**old, f"{Q}lora_magnitude_vector": torch.ones(16)}, "has an extra `lora_magnitude_vector`",
    ),
    "two adapters": (
        lambda old: {**old, f"{Q}lora_A.x.weight": torch.ones(4, 16)}, "holds several adapters",
    ),
    "a vector": (lambda old: {**old, f"{Q}lora_A.weight": torch.ones(4)}, r"`lora_A` has shape \(4,\)"),
    "nothing": (lambda old: {}, "holds no factors"),
    "modules of another model": (
        renamed(lambda name: name.replace("self_attn", "attention")),
        "base has no module `encoder.layers.0.attention.q_proj`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_an_adapter_that_is_not_whole_is_refused(base: Path, adapter: Path, name: str) -> None:
    change, message = DAMAGE[name]
    rewrite(adapter, change)
    with pytest.raises(InputError, match=message):
        read(base, adapter)


def test_an_adapter_for_a_base_of_another_width_says_which_base_it_names(
    tmp_path: Path, adapter: Path
) -> None:
    other = write_tower(tmp_path / "wide.safetensors", tower(width=24))
    configure(adapter, base_model_name_or_path="org/clip")
    with pytest.raises(
        InputError, match=r"is for a weight of shape \(16, 16\), the base has \(24, 24\)"
    ) as found:
        read(other, adapter)
    assert found.value.hint == "name the base that the adapter was trained on; it says `org/clip`"


def test_a_base_without_the_modules_is_refused(tmp_path: Path, adapter: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"(?s)the base has no module .*layers.0.*q_proj.*layers.1.*v_proj"):
        read(tmp_path / "x.safetensors", adapter)


def test_an_adapter_has_no_task_of_its_own(adapter: Path, base: Path) -> None:
    with pytest.raises(InputError, match="#one: is an adapter, and holds no tower of its own for a task"):
        open_source(parse_source(f"{adapter}/adapter_model.safetensors#one", Path()), source(base))


def test_an_adapter_is_not_added_to_a_task_vector(tmp_path: Path, adapter: Path, base: Path) -> None:
    save_file(load_file(base), tmp_path / "v.safetensors", metadata={"kind": "task vector"})
    with pytest.raises(InputError, match="is a task vector"):
        read(tmp_path / "v.safetensors", adapter)


def test_a_transposed_adapter_is_refused_where_the_layout_of_weights_is_not_known(
    tmp_path: Path, adapter: Path
) -> None:
    configure(adapter, fan_in_fan_out=True)
    own = {name.removeprefix(VISION): tensor for name, tensor in tower().state_dict().items()}
    del own["pre_layrnorm.weight"]
    save_file(own, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="`fan_in_fan_out`: the base is not a CLIP"):
        read(tmp_path / "other.safetensors", adapter)


def test_dora_of_an_embedding_is_refused(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", **{**PLAIN, "use_dora": True, "target_modules": ["position_embedding"]}
    )
    with pytest.raises(InputError, match="position_embedding`: an embedding with `use_dora`"):
        read(base, folder)


def test_other_kinds_of_adapter_are_refused_as_peft_writes_them(tmp_path: Path, base: Path) -> None:
    other = get_peft_model(tower(), IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"]))
    other.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(InputError, match='expected "LORA", got "IA3"') as caught:
        read(base, tmp_path / "ia3")
    assert "merge_and_unload" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\udcff"])
def test_a_damaged_configuration_is_one_clear_error(base: Path, adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"adapter_config.json: is not an adapter's configuration"):
        read(base, adapter)


def test_an_adapter_of_pickles_or_without_weights_is_refused(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="only pickled weights"):
        read(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no `adapter_model\.safetensors`"):
        read(base, adapter)
    with pytest.raises(InputError, match=r"is not an adapter: it has no `adapter_config\.json`"):
        read(base, base.parent)


def test_a_linearized_adapter_without_its_expansion_point_is_refused(tmp_path: Path, base: Path) -> None:
    write_linearized(tmp_path / "adapter", **PLAIN)
    file = tmp_path / "adapter" / "linearized_adapter_model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if not name.endswith("values.3")}, file)
    with pytest.raises(InputError, match=r"q_proj`: lacks `params0_values \(lora_B\)`"):
        read(base, tmp_path / "adapter")


def test_a_number_that_is_not_finite_is_told_with_the_tensor(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    rewrite(adapter, lambda old: {**old, f"{Q}lora_B.weight": torch.full((16, 4), float("nan"))})
    with pytest.raises(InputError, match=r"adapter: a: `vision_model.encoder.layers.0.*` has NaN"):
        merge({"a": adapter}, base=base, method="average", output=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "(.|..)+[!?]"},
        {"target_modules": ["q_proj"], "exclude_modules": "(.|..)+[!?]"},
        {"target_modules": ["q_proj"], "modules_to_save": ["(.|..)+[!?]"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"(.|..)+[!?]": 4}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"(.|..)+[!?]": 4}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["(.|..)+[!?]"]},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_an_expression_that_never_ends_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    folder = write_adapter(tmp_path / "a", **{**PLAIN, "target_modules": ["q_proj"]})
    monkeypatch.setattr(lora_config, "SECONDS", 0.2)
    configure(folder, **settings)
    if "target_modules" in settings and len(settings) == 1:
        rewrite(
            folder, lambda old: {name.replace("q_proj", "a" * 60 + "b"): each for name, each in old.items()}
        )
    begun = time.monotonic()
    with pytest.raises(
        InputError, match=r"a regular expression takes too long: `.*` on `.*`\nhint: write the names"
    ):
        read(write_tower(tmp_path / "base.safetensors"), folder)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    "settings", [{"target_modules": "(" * 3000}, {"exclude_modules": "a{99999999999999}"}]
)
def test_an_expression_that_is_none_is_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "a", **{**PLAIN, "target_modules": ["q_proj"]})
    configure(folder, **settings)
    with pytest.raises(InputError, match=r"is damaged:\n  `\w+`: expected a regular expression \("):
        read(write_tower(tmp_path / "base.safetensors"), folder)


@pytest.mark.parametrize(
    "expression",
    [r"(?i).*Layers\.1.*\.K_PROJ", r"^(?!.*layers\.0).*k_proj$", r"(?:.*\.)+1\.self_attn\.(?P<which>k_proj)"],
)
def test_expressions_of_every_kind_mean_what_they_mean_to_peft(tmp_path: Path, expression: str) -> None:
    folder = write_adapter(tmp_path / "a", **{**PLAIN, "target_modules": expression})
    got = read(write_tower(tmp_path / "base.safetensors"), folder)
    assert_same(got, merged_by_peft(folder), atol=1e-5)
