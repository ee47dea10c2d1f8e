"""Adapters that are trained equal those of plain peft, and plain peft reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import CLIPVisionModel

from mergecli.clip.model import load_clip
from mergecli.data.images import load_images
from mergecli.data.tasks import find
from mergecli.evaluation.evaluate import evaluate
from mergecli.formats.info import info
from mergecli.formats.opening import open_source
from mergecli.merging.merge import merge
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError
from mergecli.storage.sources import parse_source
from mergecli.training.finetune import finetune
from mergecli.training.loop import dropout_seed
from tests.support.processor import pixel_values
from tests.support.tiny_dual_encoders import make_tiny_dual_encoder
from tests.training.test_loop import BOTH, SHORT, ByHand, make_tasks, stopping

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 8}
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
KINDS = ("lora", "l_lora")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tasks(tmp_path_factory.mktemp("adapters"))


def base_of(recipe: Recipe) -> Path:
    assert recipe.base is not None
    assert recipe.base.path is not None
    return recipe.base.path


def by_hand(recipe: Recipe, kind: str, steps: int = 10) -> dict[str, Tensor]:
    """The adapter after plain peft training."""
    clip = load_clip(base_of(recipe))
    task = ByHand(clip, recipe, "tints")
    torch.manual_seed(3)
    model: Any = get_peft_model(clip.tower, LoraConfig(**PLAIN))
    model.eval()
    trained = [
        each
        for name, each in model.named_parameters()
        if "lora_B" in name or ("lora_A" in name and kind == "lora")
    ]
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            module.train()
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    for step, rows in enumerate(task.batches(6, 3, steps)):
        torch.manual_seed(dropout_seed(3, step))
        loss = task.loss(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        name.replace(".default", ""): each.detach()
        for name, each in model.named_parameters()
        if "lora_" in name
    }


def train(recipe: Recipe, folder: Path, kind: str = "lora", **more: Any) -> Any:
    settings = {"task": "tints", "schedule": "constant", **SHORT, **ADAPTER, kind: True, **more}
    return finetune(recipe, output=folder, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_what_plain_peft_trains_with_its_dropout(
    recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    train(recipe, tmp_path / "a", kind)
    got, want = load_file(tmp_path / "a" / "adapter_model.safetensors"), by_hand(recipe, kind)
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    moved = {name: float(got[name].abs().max()) for name in got if "lora_B" in name}
    assert min(moved.values()) > 1e-4


def test_a_linearized_adapter_keeps_the_a_that_it_began_with(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "short", "l_lora", steps=1)
    train(recipe, tmp_path / "long", "l_lora")
    short, long = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("short", "long"))
    assert all(torch.equal(short[name], long[name]) == ("lora_A" in name) for name in short)


def linearized(layer: nn.Module, start: dict[str, Tensor], now: dict[str, Tensor], x: Tensor) -> Tensor:
    """f(x; start) + J f(x; start) (now - start), by forward differentiation."""
    change = {name: now[name] - start[name] for name in start}
    value, along = jvp(lambda values: functional_call(layer, values, (x,)), (start,), (change,))
    return value + along


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # what forward differentiation imports
def test_a_linearized_layer_is_the_first_order_expansion_at_its_start() -> None:
    """And with B = 0 there A has no gradient: what is trained is a LoRA with a frozen A."""
    worst = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        model: Any = get_peft_model(
            nn.Sequential(nn.Linear(12, 7)), LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
        )
        layer = model.base_model.model[0]
        start = {name: each.detach().clone() for name, each in layer.named_parameters()}
        assert not start["lora_B.default.weight"].any()
        now = {name: each.clone() for name, each in start.items()}
        for part in "AB":
            now[f"lora_{part}.default.weight"] += torch.randn_like(now[f"lora_{part}.default.weight"])
        for each in now.values():
            each.requires_grad_(True)
        x, target = torch.randn(20, 12), torch.randn(20, 7)
        expanded = linearized(layer, start, now, x)
        frozen = {**now, "lora_A.default.weight": start["lora_A.default.weight"]}
        ours = functional_call(layer, frozen, (x,))
        worst = max(worst, float((expanded - ours).detach().abs().max()))
        (expanded - target).square().sum().backward()
        gradient = now["lora_B.default.weight"].grad
        assert gradient is not None
        mine = torch.autograd.grad((ours - target).square().sum(), now["lora_B.default.weight"])[0]
        worst = max(worst, float((gradient - mine).abs().max() / gradient.abs().max()))
        along_a = now["lora_A.default.weight"].grad
        assert along_a is not None
        assert not along_a.any()
    assert worst <= 1e-6  # sums of a dozen products of numbers around 1, in float32


def logits_of(tower: nn.Module, recipe: Recipe) -> Tensor:
    clip = load_clip(base_of(recipe))
    images = pixel_values(clip, [image for image, _ in load_images(find("tints", recipe), "test")])
    with torch.no_grad():
        found = tower(pixel_values=images)
        return clip.model.visual_projection(found if isinstance(found, Tensor) else found.pooler_output)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_it_with_the_logits_that_we_read(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    done = train(recipe, tmp_path / "a", kind, steps=30, learning_rate=2e-2, lora_dropout=0.3)
    assert done.path == tmp_path / "a"
    assert sorted(file.name for file in done.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = CLIPVisionModel.from_pretrained(base_of(recipe))
    before = logits_of(plain, recipe)
    theirs = logits_of(PeftModel.from_pretrained(plain, str(done.path)).eval(), recipe)
    clip = load_clip(base_of(recipe))
    with open_source(parse_source(str(done.path), Path()), recipe.base) as stored:
        state = {name: stored.read(f"vision_model.{name}") for name in clip.tower.state_dict()}
    clip.tower.load_state_dict(state)
    ours = logits_of(clip.tower, recipe)
    assert (ours - theirs).abs().max() <= 5e-6  # W x + B A x, or (W + B A) x, of numbers around 3
    assert (ours - before).abs().max() > 0.1
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_evaluated_merged_and_told_what_it_is(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    more = {"learning_rate": 3e-2, "steps": 60, "batch_size": 10}
    train(recipe, tmp_path / "a", kind, target_modules=["q_proj", "v_proj", "fc1", "fc2"], **more)
    train(recipe, tmp_path / "b", kind, task="shades", target_modules="fc1", steps=3)
    base, trained = evaluate([base_of(recipe), tmp_path / "a"], recipe=recipe, tasks=["tints"])
    assert trained.tasks["tints"].correct > base.tasks["tints"].correct
    both = {name: tmp_path / name for name in "ab"}
    merge(both, base=base_of(recipe), method="task_arithmetic", output=tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    start = load_file(base_of(recipe) / "model.safetensors")
    changed = {
        name.rpartition(".layers.")[2][2:] for name in merged if not torch.equal(merged[name], start[name])
    }
    assert changed == {
        f"{each}.weight" for each in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1", "mlp.fc2")
    }
    about = info(tmp_path / "a")
    assert (about.kind, about.metadata["task"]) == ("adapter", "tints")
    assert about.metadata["method"] == ("finetune --lora" if kind == "lora" else "finetune --l-lora")
    assert about.metadata["adapter"] == ("LoRA" if kind == "lora" else "linearized LoRA")
    assert json.loads(about.metadata["settings"])["low_rank"]["rank"] == 4
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as stored:
        assert stored.metadata()["kind"] == "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_with_dropout_ends_with_the_bytes_of_one_that_was_not(
    recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    more = {"lora_dropout": 0.3, "validate_every": 3, "accumulate": 2, "task": BOTH}
    train(recipe, tmp_path / "a", kind, **more)
    torch.manual_seed(99)  # what was drawn before does not matter
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "b", kind, progress=stopping(4), **more)
    assert not (tmp_path / "b").exists()
    drawn = torch.random.get_rng_state()
    assert train(recipe, tmp_path / "b", kind, **more).resumed_from == 4
    assert torch.equal(torch.random.get_rng_state(), drawn)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_dropout_is_drawn_anew_at_each_step(recipe: Recipe, tmp_path: Path) -> None:
    for dropout in (0.0, 0.3):
        train(recipe, tmp_path / str(dropout), lora_dropout=dropout)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("0.0", "0.3")]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert (
        len({dropout_seed(seed, step, process) for seed in (0, 1) for step in (0, 1) for process in (0, 1)})
        == 8
    )


def test_adapters_that_cannot_be_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"has no linear layer `qproj` \(did you mean `q_proj`\?\)"
    ) as caught:
        train(recipe, tmp_path / "a", target_modules=["qproj"])
    assert caught.value.hint == "its linear layers are `fc1`, `fc2`, `k_proj`, `out_proj`, `q_proj`, `v_proj`"
    with pytest.raises(UsageError, match="`rank`: 17 is more than a side of these layers") as caught:
        train(recipe, tmp_path / "a", rank=17)
    assert "`encoder.layers.0.self_attn.v_proj` is 16 x 16" in caught.value.message
    with pytest.raises(UsageError, match="got both"):
        train(recipe, tmp_path / "a", l_lora=True)
    with pytest.raises(UsageError, match="`rank`, `lora_dropout`: only low-rank adapters have it"):
        finetune(recipe, task="tints", output=tmp_path / "a", rank=4, lora_dropout=0.1)
    with pytest.raises(UsageError, match="an adapter is a folder"):
        train(recipe, tmp_path / "a.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"has a `model\.safetensors`, which would be read instead"):
        train(recipe, tmp_path / "full")
    assert not (tmp_path / "a").exists()


def test_results_say_how_an_adapter_was_made(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "a", "l_lora", steps=1)
    (result,) = evaluate(tmp_path / "a", recipe=recipe, tasks=["tints"])
    assert result.checkpoint["method"] == "finetune --l-lora"


def test_an_adapter_of_a_siglip_names_the_module_that_peft_puts_it_on(tmp_path: Path) -> None:
    base = make_tiny_dual_encoder(tmp_path / "base", "siglip")
    more: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "steps": 1}
    finetune(base=base, task="digits", output=tmp_path / "a", lora=True, **ADAPTER, **more)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    module = {
        "base_model_class": "SiglipVisionModel",
        "parent_library": "transformers.models.siglip.modeling_siglip",
    }
    assert config["auto_mapping"] == module
