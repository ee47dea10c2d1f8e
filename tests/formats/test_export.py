"""A CLIP under open_clip's names is what open_clip makes of it, and comes back bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel

from mergecli.formats import export as exporting
from mergecli.formats import info as inspection
from mergecli.formats.convert import convert
from mergecli.formats.export import export
from mergecli.formats.opening import open_source
from mergecli.formats.pickles import read_state
from mergecli.merging.extract import extract
from mergecli.merging.merge import merge
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.sources import parse_source
from tests.conftest import Run, Weights, World, assert_same
from tests.formats.test_convert import Visual, as_open_clip
from tests.support.tiny_clip import make_tiny_clip

VISION = "vision_model."


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tuned(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower near the CLIP's own, alone."""
    generator = torch.Generator().manual_seed(1)
    state = load_file(clip / "model.safetensors")
    tower = {
        name: each + 0.1 * torch.randn(each.shape, generator=generator)
        for name, each in state.items()
        if name.startswith(VISION)
    }
    file = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    save_file(tower, file)
    return file


def loaded(file: Path) -> Weights:
    return load_file(file) if file.suffix == ".safetensors" else read_state([file])[0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_tower_gets_open_clips_names_and_the_rest_of_the_clip(
    clip: Path, tuned: Path, tmp_path: Path, suffix: str
) -> None:
    done = export(tuned, clip=clip, output=tmp_path / f"out{suffix}")
    ours = load_file(clip / "model.safetensors") | load_file(tuned)
    want = {name: each.contiguous() for name, each in as_open_clip(ours).items()}
    assert_same(loaded(done.path), want)
    assert done.tensors == len(want)
    assert done.parameters == sum(each.numel() for each in want.values())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_was_exported_comes_back_bit_by_bit(clip: Path, tmp_path: Path, suffix: str) -> None:
    done = export(clip, output=tmp_path / f"out{suffix}")
    read = (
        done.path
        if suffix == ".safetensors"
        else convert(done.path, tmp_path / "b.safetensors", allow_pickle=True)
    )
    with (
        open_source(parse_source(str(read), Path())) as back,
        open_source(parse_source(str(clip), Path())) as before,
    ):
        assert_same(
            {name: back.read(name) for name in back.entries},
            {name: before.read(name) for name in before.entries},
        )
        assert back.digest() == before.digest()
    again = export(clip, output=tmp_path / f"again{suffix}")
    assert again.path.read_bytes() == done.path.read_bytes()


def test_plain_torch_computes_the_same_features_with_it(clip: Path, tuned: Path, tmp_path: Path) -> None:
    state = loaded(export(tuned, clip=clip, output=tmp_path / "out.pt").path)
    visual = Visual()
    visual.load_state_dict(
        {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    )
    model: Any = CLIPModel.from_pretrained(clip)
    model.load_state_dict(model.state_dict() | load_file(tuned))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model.visual_projection(model.vision_model(pixels).pooler_output)
        torch.testing.assert_close(visual(pixels), want, atol=1e-5, rtol=0)


def test_every_tensor_keeps_its_dtype(clip: Path, tuned: Path, tmp_path: Path) -> None:
    save_file({k: v.bfloat16() for k, v in load_file(tuned).items()}, tmp_path / "half.safetensors")
    state = loaded(export(tmp_path / "half.safetensors", clip=clip, output=tmp_path / "out.safetensors").path)
    assert state["visual.transformer.resblocks.0.attn.in_proj_weight"].dtype == torch.bfloat16
    assert {v.dtype for k, v in state.items() if k.startswith("visual.") and k != "visual.proj"} == {
        torch.bfloat16
    }
    assert {v.dtype for k, v in state.items() if not k.startswith("visual.")} == {torch.float32}


def test_an_adapter_is_added_to_the_clip_and_a_mixture_gives_the_tower_of_a_task(
    clip: Path, tuned: Path, tmp_path: Path
) -> None:
    extract(tuned, base=clip, rank=16, output=tmp_path / "lora")
    got = loaded(export(tmp_path / "lora", clip=clip, output=tmp_path / "lora.pt").path)
    want = loaded(export(tuned, clip=clip, output=tmp_path / "tuned.pt").path)
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="lora: is an adapter, and there is no CLIP to add it to"):
        export(tmp_path / "lora", output=tmp_path / "out.pt")
    models = {"one": tuned, "two": clip}
    merge(models, base=clip, method="tall_mask", output=tmp_path / "mixture.safetensors")
    with pytest.raises(InputError, match="holds towers for one, two, and one tower is needed"):
        export(tmp_path / "mixture.safetensors", clip=clip, output=tmp_path / "out.pt")
    task = loaded(
        export(f"{tmp_path / 'mixture.safetensors'}#one", clip=clip, output=tmp_path / "task.pt").path
    )
    assert task.keys() == want.keys()
    assert not (tmp_path / "out.pt").exists()


def test_a_file_says_what_it_was_made_of(clip: Path, tuned: Path, tmp_path: Path) -> None:
    merge({"a": tuned, "b": clip}, base=clip, method="average", output=tmp_path / "m.safetensors")
    done = export(tmp_path / "m.safetensors", clip=clip, output=tmp_path / "out.safetensors")
    about = inspection.info(done.path)
    assert about.metadata["exported_to"] == "open_clip"
    assert about.metadata["method"] == "average"
    assert about.inputs == done.inputs
    assert about.inputs["tower"] == inspection.info(tmp_path / "m.safetensors").digest == about.digest


@pytest.mark.parametrize(("activation", "name"), [("quick_gelu", "ViT-T-8-quickgelu"), ("gelu", "ViT-T-8")])
def test_the_model_that_open_clip_has_to_create_is_told(
    clip: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, activation: str, name: str
) -> None:
    assert export(clip, output=tmp_path / "unknown.pt").model is None
    monkeypatch.setattr(exporting, "_ARCHITECTURES", {(16, 2, 8, 5): "ViT-T-8"})
    shutil.copytree(clip, tmp_path / "clip")
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"]["hidden_act"] = activation
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    ended = run("export", "clip", "--to", "open_clip", "-o", "out.pt", "--json")
    assert ended.err == f'note: open_clip.create_model("{name}", pretrained="out.pt") loads it\n'
    told = json.loads(ended.out)
    assert (told["path"], told["model"], told["tensors"]) == (
        "out.pt",
        name,
        len(loaded(tmp_path / "out.pt")),
    )


def test_what_cannot_be_exported_is_refused(
    clip: Path, tuned: Path, tmp_path: Path, run: Run, world: World
) -> None:
    taskvector(tuned, base=clip, output=tmp_path / "vector.safetensors")
    make_tiny_clip(tmp_path / "larger", side=32)
    odd = load_file(clip / "model.safetensors") | {"vision_model.encoder.extra": torch.ones(2)}
    save_file(odd, tmp_path / "odd.safetensors")
    shutil.copy(tuned, tmp_path / "here.safetensors")
    for arguments, status, message in (
        ([tuned, "-o", "a.pt"], 3, f"error: {tuned}: has a vision tower alone, and the text tower, the projections and the "
         "logit scale have to come from one\nhint: name the CLIP that it was fine-tuned from with `--clip`\n"),
        ([tuned, "--clip", tuned, "-o", "a.pt"], 3, f"error: {tuned}: is no whole CLIP, and the text tower"),
        ([tuned, "--clip", tmp_path / "larger", "-o", "a.pt"], 3, "is of another architecture than the CLIP: patches of 8 pixels; "
         "the CLIP has patches of 16 pixels\n"),
        (["vector.safetensors", "--clip", clip, "-o", "a.pt"], 3, "error: vector.safetensors: is a task vector, and no model\n"),
        (["odd.safetensors", "-o", "a.pt"], 3, "odd.safetensors: has not the tensors of a CLIP:\n"
         "  has an extra tensor `vision_model.encoder.extra`\n"),
        ([world.files["t1"], "--clip", clip, "-o", "a.pt"], 3, "has no vision tower of a CLIP\n"),
        ([clip, "--to", "gguf", "-o", "a.pt"], 2, "error: --to: expected open_clip, got `gguf`\n"),
        ([clip, "-o", "a.bin"], 2, "error: a.bin: expected a .pt or .safetensors file\n"),
        (["here.safetensors", "--clip", clip, "-o", "here.safetensors"], 2, "the output would replace an input"),
    ):  # fmt: skip
        ended = run("export", *arguments)
        assert ended.status == status, ended.err
        assert message in ended.err
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clips_own_model_predicts_the_same(clip: Path, tuned: Path, tmp_path: Path, suffix: str) -> None:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip is not installed: {error}")
    done = export(tuned, clip=clip, output=tmp_path / f"out{suffix}")
    model: Any = CLIPModel.from_pretrained(clip).eval()
    model.load_state_dict(model.state_dict() | load_file(tuned))
    text = model.config.text_config
    config = {
        "embed_dim": 8, "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 77, "vocab_size": text.vocab_size, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2.0},
    }  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    theirs: nn.Module = open_clip.create_model("tiny-clip", pretrained=str(done.path)).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20, 3, 16, 16, generator=generator)
    words = torch.randint(1, text.eos_token_id - 1, (5, 77), generator=generator)
    words[:, 0], words[:, 10:] = text.bos_token_id, text.eos_token_id
    with torch.no_grad():
        got, got_text, scale = theirs(images, words)
        want = model(input_ids=words, pixel_values=images)
    logits = scale * got @ got_text.T
    torch.testing.assert_close(logits, want.logits_per_image, atol=1e-4, rtol=0)
    assert bool((logits.argmax(1) == want.logits_per_image.argmax(1)).all())
