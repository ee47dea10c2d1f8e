"""Pickles and open_clip's names become safetensors with Hugging Face's names, and hostile files become errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergecli.formats.convert import convert, is_pickled, needs_conversion
from mergecli.formats.opening import open_source
from mergecli.formats.pickles import read_state
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.sources import parse_source
from tests.conftest import Run, Weights, assert_same
from tests.support.tiny_clip import make_image_folder, make_tiny_clip

BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


class Opened:
    """A class that only this file knows."""


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 2 * width),
            "gelu": nn.Identity(),
            "c_proj": nn.Linear(2 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class Visual(nn.Module):
    """The vision transformer of OpenAI's CLIP, in plain torch, so that the names and layouts are torch's own."""

    def __init__(self, width: int = 16, tokens: int = 5, out: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(width) for _ in range(2)))
        self.proj = nn.Parameter(torch.randn(width, out))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).permute(2, 0, 1)
        first = self.class_embedding.expand(1, len(pixels), -1)
        x = torch.cat([first, patches]) + self.positional_embedding[:, None]
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x))[0]) @ self.proj


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def as_open_clip(ours: Weights, prefix: str = "", tower_only: bool = False) -> Weights:
    """A Hugging Face CLIP's weights under open_clip's names."""
    theirs: Weights = {}
    towers = {"vision_model.": "visual."} if tower_only else {"vision_model.": "visual.", "text_model.": ""}
    for tower, root in towers.items():
        for number in range(2):
            old, new = f"{root}transformer.resblocks.{number}.", f"{tower}encoder.layers.{number}."
            for kind in ("weight", "bias"):
                for name, own in BLOCK.items():
                    theirs[f"{old}{name}.{kind}"] = ours[f"{new}{own}.{kind}"]
                thirds = [ours[f"{new}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                theirs[f"{old}attn.in_proj_{kind}"] = torch.cat(thirds)
        theirs[f"{root}positional_embedding"] = ours[f"{tower}embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        theirs[f"visual.ln_pre.{kind}"] = ours[f"vision_model.pre_layrnorm.{kind}"]
        theirs[f"visual.ln_post.{kind}"] = ours[f"vision_model.post_layernorm.{kind}"]
        if not tower_only:
            theirs[f"ln_final.{kind}"] = ours[f"text_model.final_layer_norm.{kind}"]
    theirs["visual.class_embedding"] = ours["vision_model.embeddings.class_embedding"]
    theirs["visual.conv1.weight"] = ours["vision_model.embeddings.patch_embedding.weight"]
    theirs["visual.proj"] = ours["visual_projection.weight"].t()
    if not tower_only:
        theirs["token_embedding.weight"] = ours["text_model.embeddings.token_embedding.weight"]
        theirs["text_projection"] = ours["text_projection.weight"].t()
        theirs["logit_scale"] = ours["logit_scale"]
    return {prefix + name: tensor for name, tensor in theirs.items()}


def saved(content: object, file: Path, **how: object) -> Path:
    torch.save(content, file, **how)
    return file


def converted(source: Path) -> Weights:
    return load_file(convert(source, source.parent / "out" / "new.safetensors", allow_pickle=True))


def refused(source: Path, culprit: str = "") -> InputError:
    """The error, once it is known that it names the file and that nothing was written."""
    target = source.parent / "refused" / "new.safetensors"
    with pytest.raises(InputError) as caught:
        convert(source, target, allow_pickle=True)
    assert not list(target.parent.glob("*"))
    assert caught.value.message.startswith(f"{source.parent / (culprit or source.name)}: ")
    return caught.value


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor_is_kept_bit_by_bit(tmp_path: Path, zipped: bool) -> None:
    big = torch.randn(6, 8)
    state = {
        "slice": big[1:4, 2:5],
        "transposed": big.t(),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "tied.a": big,
        "tied.b": big,
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "whole": torch.arange(7),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    file = saved(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert_same(converted(file), {name: tensor.detach() for name, tensor in state.items()})


def test_the_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    file = saved({"state_dict": {"a": torch.ones(2), "steps": 7}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert list(converted(file)) == ["a"]
    with safe_open(tmp_path / "out" / "new.safetensors", "pt") as opened:
        about = opened.metadata()
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert (about["format"], about["kind"], about["converted_from"]) == ("pt", "checkpoint", file.name)
    assert json.loads(about["inputs"]) == {file.name: digest}
    assert json.loads(about["left_out"]) == ["epoch", "steps"]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_state_dicts_inside_of_tables_and_parallel_prefixes_are_unwrapped(
    tmp_path: Path, key: str, prefix: str
) -> None:
    state = {"model.layer.weight": torch.randn(2, 2), "model.layer.bias": torch.randn(2)}
    table = {"best": torch.tensor(0.9), key: {prefix + name: value for name, value in state.items()}}
    assert_same(converted(saved(table, tmp_path / "a.pt")), state)


def test_a_prefix_that_not_all_names_have_is_part_of_the_names(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "head": torch.ones(2)}
    assert_same(converted(saved(state, tmp_path / "a.pt")), state)


def test_shards_become_one_file(tmp_path: Path) -> None:
    shards = {"one.bin": {"a": torch.randn(2)}, "two.bin": {"b": torch.randn(3), "c": torch.arange(2)}}
    for name, state in shards.items():
        saved(state, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin", "c": "two.bin"}}))
    for source in (index, tmp_path):
        assert is_pickled(source)
        assert needs_conversion(source)
        assert_same(converted(source), {**shards["one.bin"], **shards["two.bin"]})


def test_shards_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    saved({"a": torch.ones(1)}, tmp_path / "one.bin")
    assert "shards are missing:\n  two.bin" in refused(index).message
    saved({"a": torch.ones(1)}, tmp_path / "two.bin")
    assert "`a` stands in another shard too" in refused(index, "two.bin").message
    for text in ("no json", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../one.bin"}}'):
        index.write_text(text)
        assert "is not an index of shards" in refused(index).message


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.image_encoder.model."])
def test_a_whole_open_clip_gives_the_same_logits(tmp_path: Path, clip: Path, prefix: str) -> None:
    from transformers import CLIPModel

    ours = load_file(clip / "model.safetensors")
    theirs = {**as_open_clip(ours, prefix), prefix + "context_length": torch.tensor(77)}
    new = converted(saved(theirs, tmp_path / "a.pt"))
    assert_same(new, ours)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = torch.tensor([[512, 5, 6, 513]])
    pixels = torch.randn(2, 3, 16, 16)
    before = model(input_ids=tokens, pixel_values=pixels).logits_per_image
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(new)
    assert torch.equal(model(input_ids=tokens, pixel_values=pixels).logits_per_image, before)


def test_a_text_tower_in_a_room_of_its_own_and_a_long_logit_scale_are_known(
    tmp_path: Path, clip: Path
) -> None:
    ours = load_file(clip / "model.safetensors")
    theirs = {
        name if name.startswith(("visual.", "logit")) else "text." + name: value.view(1) if name == "logit_scale" else value
        for name, value in as_open_clip(ours).items()
    }  # fmt: skip
    assert_same(converted(saved(theirs, tmp_path / "a.pt")), ours)


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual.", "image_encoder.model.visual."])
def test_a_vision_transformer_written_in_plain_torch_computes_the_same(tmp_path: Path, prefix: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    visual = Visual().eval()
    state = {prefix + name: tensor for name, tensor in visual.state_dict().items()}
    if prefix:
        state |= {"classification_head.weight": torch.ones(3, 8)}
    new = converted(saved(state, tmp_path / "a.pt"))
    with safe_open(tmp_path / "out" / "new.safetensors", "pt") as opened:
        assert json.loads(opened.metadata().get("left_out", "[]")) == ["classification_head.weight"] * bool(
            prefix
        )
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8, hidden_act="quick_gelu",
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    projection = new.pop("visual_projection.weight")
    tower.load_state_dict({name.removeprefix("vision_model."): tensor for name, tensor in new.items()})
    pixels = torch.randn(2, 3, 16, 16)
    ours = tower(pixel_values=pixels).pooler_output @ projection.T
    # two implementations of the same float32 attention round differently
    assert torch.allclose(ours, visual(pixels), atol=1e-5, rtol=1e-5)


def test_what_is_left_of_a_text_tower_in_a_fine_tuned_encoder_is_left_out(tmp_path: Path, clip: Path) -> None:
    ours = load_file(clip / "model.safetensors")
    whole = as_open_clip(ours, "model.")
    encoder = {name: value for name, value in whole.items() if not name.startswith("model.transformer.")}
    tower = {name: value for name, value in ours.items() if name.startswith("vis")}
    assert_same(converted(saved(encoder, tmp_path / "a.pt")), tower)


def test_safetensors_with_old_names_need_no_pickle(tmp_path: Path, clip: Path) -> None:
    ours = load_file(clip / "model.safetensors")
    old = {name: value.contiguous() for name, value in as_open_clip(ours).items()}
    save_file(old, tmp_path / "old.safetensors", {"kind": "task vector"})
    assert not needs_conversion(tmp_path / "old.safetensors")  # it is read as it is
    assert not is_pickled(tmp_path / "old.safetensors")
    new = convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    assert_same(load_file(new), ours)
    with safe_open(new, "pt") as opened:
        assert opened.metadata()["kind"] == "task vector"
    assert not needs_conversion(new)
    assert not needs_conversion(clip)
    with pytest.raises(UsageError, match="nothing to convert"):
        convert(clip, tmp_path / "again.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "image_encoder.model."])
def test_a_wrapped_hugging_face_tower_loses_its_wrapper(tmp_path: Path, clip: Path, prefix: str) -> None:
    ours = load_file(clip / "model.safetensors")
    tower = {name: value for name, value in ours.items() if name.startswith("vision_model.")}
    wrapped = {prefix + name: value for name, value in tower.items()}
    wrapped[prefix + "vision_model.embeddings.position_ids"] = torch.arange(5)
    assert_same(converted(saved(wrapped, tmp_path / "a.bin")), tower)


def test_half_a_clip_is_refused_with_every_difference(tmp_path: Path, clip: Path) -> None:
    theirs = as_open_clip(load_file(clip / "model.safetensors"))
    del theirs["visual.transformer.resblocks.1.ln_2.bias"]
    theirs["visual.transformer.resblocks.0.ls_1.gamma"] = torch.ones(16)
    theirs["visual.transformer.resblocks.0.attn.in_proj_weight"] = torch.ones(47, 16)
    message = refused(saved(theirs, tmp_path / "a.pt")).message
    assert "lacks tensor `visual.transformer.resblocks.1.ln_2.bias`" in message
    assert "has an extra tensor `visual.transformer.resblocks.0.ls_1.gamma`" in message
    assert "(47, 16), which does not split into query, key and value" in message
    twice = {**as_open_clip(load_file(clip / "model.safetensors"), "a."), **theirs}
    assert "holds 2 vision towers" in refused(saved(twice, tmp_path / "b.pt")).message


def test_a_pickle_is_refused_unless_asked_for(tmp_path: Path) -> None:
    file = saved({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="may start any program") as caught:
        convert(file, tmp_path / "new.safetensors")
    assert "`--allow-pickle`" in caught.value.hint
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
    with pytest.raises(UsageError, match=r"expected a \.safetensors file"):
        convert(file, file, allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("forced", ["0", "1"])
def test_code_in_a_pickle_never_runs(
    tmp_path: Path, zipped: bool, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    content = {"a": torch.ones(1), "b": Evil(tmp_path / "evil")}
    file = saved(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    error = refused(file)
    assert f"`{os.mkdir.__module__}.mkdir`" in error.message
    assert "if isinstance(each, torch.Tensor)}, NEW)`" in error.hint
    assert not (tmp_path / "evil").exists()
    torch.load(file, weights_only=False)  # noqa: TID251
    assert (tmp_path / "evil").exists()  # so the file is what it is meant to be


class Encoder(nn.Module):
    """As repositories save encoders: a module with others inside, and with what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Visual()
        self.model.register_buffer("mask", torch.ones(2), persistent=False)
        self.model.register_buffer("scale", torch.ones(1))
        self.model.register_parameter("bias", None)
        self.steps = nn.ModuleList([nn.BatchNorm2d(3)])
        self.arguments = Namespace(lr=1, what=Opened(), some={1, 2})


def test_a_pickled_module_of_whatever_class_becomes_its_state_dict_and_its_class_is_never_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Encoder()
    want = module.state_dict()
    alone = saved(module, tmp_path / "alone.pt")
    inside = saved({"epoch": 1, "model": module, "args": Namespace(lr=1)}, tmp_path / "inside.pt")
    beside = saved({"state_dict": module.state_dict(), "args": Namespace(lr=1)}, tmp_path / "beside.pt")
    for each in ("Encoder", "Visual", "Block", "Opened"):
        monkeypatch.delattr(f"{__name__}.{each}")
    for file, others in ((alone, []), (inside, ["epoch", "args"]), (beside, ["args"])):
        got, left_out = read_state([file])
        assert_same(got, dict(want))
        assert left_out == others


def test_a_module_that_is_inside_of_itself_ends(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0]._modules["again"] = module
    got, _ = read_state([saved(module, tmp_path / "a.pt")])
    assert sorted(got) == ["0.bias", "0.weight"]


class Evals(nn.Module):
    """A module whose file asks for a function of Python when it is opened, and has names of what reads it."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.code, self.path, self.is_module = Evaluated(code), 3, False


class Evaluated:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (self.code,)


def test_what_a_module_would_run_is_not_run(tmp_path: Path) -> None:
    module = Evals(f"__import__('os').mkdir({str(tmp_path / 'evil')!r})")
    file = saved({"model": module, "more": Evaluated("1 / 0")}, tmp_path / "a.pt")
    got, _ = read_state([file])
    assert_same(got, {"weight": torch.ones(2)})
    assert not (tmp_path / "evil").exists()
    with pytest.raises(ZeroDivisionError):
        torch.load(file, weights_only=False)  # noqa: TID251
    assert (tmp_path / "evil").exists()  # so the file is what it is meant to be


def test_an_object_among_the_tensors_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    own = saved({"a": torch.ones(1), "arguments": Opened()}, tmp_path / "own.pt")
    assert "`tests.formats.test_convert.Opened`" in refused(own).message
    file = saved(nn.Linear(2, 2), tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    assert "`torch.nn.modules.linear.Linear`" in refused(file).message
    alone = saved(Opened(), tmp_path / "object.pt")
    assert "it wants `tests.formats.test_convert.Opened`, which would run code" in refused(alone).message


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    file = saved({"a": torch.ones(1)}, tmp_path / "a.pt")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    error = refused(file)
    assert "TorchScript" in error.message
    assert "torch.jit.load" in error.hint


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path, zipped: bool) -> None:
    file = saved({"a": torch.randn(400)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for length in range(20, len(whole), 97):
        file.write_bytes(whole[:length])
        message = refused(file).message
        # where an old file ends in the middle of a pickle, half a name looks like one that is not allowed
        assert "is damaged" in message or (length < 600 and not zipped), length


def test_a_wrong_bit_in_a_zip_is_found(tmp_path: Path) -> None:
    values = torch.randn(400)
    file = saved({"a": values}, tmp_path / "a.pt")
    content = bytearray(file.read_bytes())
    content[content.index(values.numpy().tobytes()) + 801] ^= 4
    file.write_bytes(content)
    assert "is damaged: Bad CRC-32 for file 'a/data/0'" in refused(file).message


def test_zips_without_checksums_and_compressed_zips_are_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(400), "b": torch.zeros(50)}
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(state, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(converted(file), state)
    file = saved(state, tmp_path / "b.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(converted(tmp_path / "c.pt"), state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is neither a safetensors file nor one that `torch.save` wrote"),
        (b"PK\x03\x04 and no zip", "is damaged"),
        (b"\x80\x02 and no pickle", "is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_what_torch_did_not_write_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content)
    assert message in refused(file).message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds a dict without named tensors"),
        ({"epoch": 1, "model": {"a": 1}}, "without named tensors (`epoch`, `model`)"),
        (torch.ones(2), "holds a Tensor without named tensors"),
        ([torch.ones(2)], "holds a list without named tensors"),
        ({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, "holds several state dicts"),
        (
            {"a": torch.eye(2).to_sparse()},
            "`a` is a tensor of a kind that safetensors cannot hold (sparse_coo)",
        ),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "cannot hold (complex128)"),
        ({"__metadata__": torch.ones(1)}, "cannot be the name of a tensor"),
        ({"\ud800": torch.ones(1)}, "cannot be the name of a tensor"),
    ],
)
def test_what_has_no_named_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    assert message in refused(saved(content, tmp_path / "a.pt")).message


def test_a_missing_file_and_a_folder_of_several_are_told(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "a.pt").message
    for name in ("a.pt", "b.pt"):
        saved({"a": torch.ones(1)}, tmp_path / name)
    assert "has 2 pickled files: `a.pt`, `b.pt`" in refused(tmp_path).message


MODULE = nn.Linear(2, 2)
LOAD = "torch.load(OLD, weights_only=False)"


@pytest.mark.parametrize(
    ("content", "saves", "zipped"),
    [
        (MODULE, "", False),
        ({"model": MODULE.state_dict(), "args": Namespace(lr=1)}, '["model"]', False),
        ({"epoch": 1, "state_dict": MODULE}, '["state_dict"]', False),
        ({"w": torch.ones(2), "args": Namespace(lr=1)}, "isinstance(each, torch.Tensor)", True),
        (OrderedDict(w=torch.ones(2), args=Namespace(lr=1)), "isinstance(each, torch.Tensor)", False),
        ({"w": np.ones(3)}, "torch.as_tensor(each)", True),
        ({"w": np.ones(3)}, "torch.as_tensor(each)", False),
    ],
    ids=["module", "state dict inside", "module inside", "dictionary", "ordered", "numpy", "old numpy"],
)
def test_the_hint_saves_what_the_pickle_holds(
    tmp_path: Path, content: object, saves: str, zipped: bool
) -> None:
    """The hint's own code, run by hand, makes a file that is read."""
    file = saved(content, tmp_path / "old.pt", _use_new_zipfile_serialization=zipped)
    hint = refused(file).hint
    assert saves in hint
    code = hint.partition("`")[2].partition("`")[0]
    if "is a module" in hint and not isinstance(next(iter(content.values())), dict):  # type: ignore[attr-defined]
        code = code.replace('"]', '"].state_dict()')
    new = tmp_path / "new.pt"
    exec(code, {"torch": torch, "OLD": file, "NEW": new})
    assert converted(new)


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"net": {"w": torch.ones(2)}}, '["net"]'),
        ({"state_dict": {"model": {"w": torch.ones(2)}}, "epoch": 3}, '["state_dict"]["model"]'),
        ({"runs": {3: {"w": torch.ones(2)}}}, '["runs"][3]'),
    ],
)
def test_a_dictionary_further_inside_is_pointed_at(tmp_path: Path, content: object, path: str) -> None:
    file = saved(content, tmp_path / "old.pt")
    assert (
        refused(file).hint
        == f"`torch.save(torch.load(OLD){path}, NEW)` saves those that it has further inside"
    )
    exec(f"torch.save(torch.load(OLD){path}, NEW)", {"torch": torch, "OLD": file, "NEW": tmp_path / "new.pt"})
    assert_same(converted(tmp_path / "new.pt"), {"w": torch.ones(2)})


@pytest.mark.parametrize("prefix", ["", "model.clip."])
def test_safetensors_with_names_of_open_clip_are_read_as_they_are(
    tmp_path: Path, clip: Path, run: Run, prefix: str
) -> None:
    ours = load_file(clip / "model.safetensors")
    theirs = {name: each.contiguous() for name, each in as_open_clip(ours, prefix).items()}
    save_file(theirs, tmp_path / "a b.safetensors")
    assert run("fetch", "a b.safetensors").out == "a b.safetensors\n"
    model = "birds=a b.safetensors"
    for base, method in ((clip, "task_arithmetic"), ("a b.safetensors", "iso_c")):
        ended = run("merge", "--base", base, model, "--method", method, "-o", "m.safetensors")
        assert (ended.status, ended.rest) == (
            0,
            "warning: `birds` has the weights of the base: its task vector is zero\n",
        )
        tower = {name: each for name, each in ours.items() if name.startswith("vision_model.")}
        assert_same(load_file(tmp_path / "m.safetensors"), tower)
    known, said = (run("info", each, "--json").out for each in (clip, "a b.safetensors"))
    assert json.loads(said)["digest"] == json.loads(known)["digest"]
    with open_source(parse_source("a b.safetensors", tmp_path)) as opened:
        assert_same({name: opened.read(name) for name in opened.entries}, ours)


def test_a_base_with_names_of_open_clip_is_named_with_the_command_that_rewrites_it(
    tmp_path: Path, clip: Path, run: Run
) -> None:
    ours = load_file(clip / "model.safetensors")
    folder = shutil.copytree(clip, tmp_path / "a base")
    theirs = {name: each.contiguous() for name, each in as_open_clip(ours).items()}
    save_file(theirs, folder / "model.safetensors")
    make_image_folder(tmp_path / "data")
    (tmp_path / "r.toml").write_text(
        'base = "a base"\n[eval]\ntasks = ["birds"]\n[tasks.birds]\ndata = "data"\ntemplates = ["a {}"]\n'
    )
    command = ["eval", clip, "--recipe", "r.toml", "-o", "r.json"]
    before = run(*command)
    assert before.status == 3
    assert before.rest.splitlines()[-2:] == [
        "error: a base: is not a whole CLIP",
        "hint: a base has open_clip's names: `mergecli fetch 'a base'` rewrites it once, and from then on that is read in "
        "its place",
    ]
    assert run("fetch", "a base").status == 0
    assert run(*command).status == 0


@pytest.mark.parametrize(
    "lead", ["module.", "model.", "_orig_mod.", "backbone.", "clip.", "module.model.clip."]
)
def test_a_wrapped_clip_is_read_as_it_is(tmp_path: Path, clip: Path, run: Run, lead: str) -> None:
    ours = load_file(clip / "model.safetensors")
    save_file({lead + name: each for name, each in ours.items()}, tmp_path / "a.safetensors")
    ended = run(
        "merge", "--base", clip, "a.safetensors", "--method", "task_arithmetic", "-o", "m.safetensors"
    )
    same = "warning: `a` has the weights of the base: its task vector is zero\n"
    assert (ended.status, ended.err) == (0, same)
    tower = {name: each for name, each in ours.items() if name.startswith("vision_model.")}
    assert_same(load_file(tmp_path / "m.safetensors"), tower)


def test_two_towers_in_one_file_are_named(tmp_path: Path, clip: Path, run: Run) -> None:
    ours = load_file(clip / "model.safetensors")
    twice = {lead + name: each.clone() for lead in ("ema.", "model.") for name, each in ours.items()}
    save_file(twice, tmp_path / "a.safetensors")
    ended = run(
        "merge", "--base", clip, "a.safetensors", "--method", "task_arithmetic", "-o", "m.safetensors"
    )
    assert ended.status == 3
    assert ended.err.splitlines()[-1] == (
        "hint: a.safetensors holds 2 vision towers, under `ema.`, `model.`: save the one that is meant alone"
    )
