from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mergecli.data.toy
from mergecli.clip.model import load_clip
from mergecli.clip.tokenizer import Tokenizer
from mergecli.runtime.errors import InputError
from tests.support.tiny_clip import make_tiny_clip

TOY = Path(mergecli.data.toy.__file__).parent / "models" / "base"
PROMPTS = (
    "a photo of a Cat.", "", "  two\tspaces\n", "it's we've they'll I'd", "Ünïcödé e\u0301 straße 北京 🙂", "3.14, 1/2",
    "<|endoftext|> inside", "x" * 200, "A-B_c's (thing)! \x00", "<|startoftext|>",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("tokenizer") / "clip")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def expect_equal(folder: Path) -> None:
    from transformers import CLIPTokenizer

    theirs, ours = CLIPTokenizer.from_pretrained(folder, local_files_only=True), Tokenizer(folder)
    assert len(ours) == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    for prompt in PROMPTS:
        assert ours([prompt]).tolist() == [theirs(prompt)["input_ids"]], prompt
    both = ours(PROMPTS[:4])
    want = theirs(list(PROMPTS[:4]), padding=True, return_tensors="pt")
    assert both.equal(want["input_ids"].masked_fill(want["attention_mask"] == 0, theirs.eos_token_id))


@pytest.mark.parametrize("source", ["toy", "tiny"])
def test_tokens_are_those_of_transformers(source, folder):
    expect_equal(TOY if source == "toy" else folder)


def test_tokens_of_two_files_are_those_of_transformers(tmp_path):
    words = json.loads((TOY / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(words["vocab"]))
    lines = [each if isinstance(each, str) else " ".join(each) for each in words["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    expect_equal(tmp_path)
    assert Tokenizer(tmp_path)(PROMPTS).equal(Tokenizer(TOY)(PROMPTS))


def test_special_tokens_may_be_written_as_tables_and_padding_as_anything(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    table = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False,
             "single_word": False}  # fmt: skip
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": table, "pad_token": "!"}))
    expect_equal(copy)


def test_merges_may_be_pairs_or_words(copy):
    words = json.loads((copy / "tokenizer.json").read_text())
    for merges in ([["a", "b"]], ["a b"]):
        number = len(words["model"]["vocab"])
        both = {
            **words,
            "model": {**words["model"], "merges": merges, "vocab": {**words["model"]["vocab"], "ab": number}},
        }
        (copy / "tokenizer.json").write_text(json.dumps(both))
        assert Tokenizer(copy)(["abc"]).tolist()[0][1] == number
        expect_equal(copy)


def test_a_tokenizer_that_knows_nothing_is_refused(copy):
    words = json.loads((copy / "tokenizer.json").read_text())
    words["model"]["vocab"] = {"a": 0}
    (copy / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="its tokenizer knows only 3 tokens"):
        Tokenizer(copy)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"vocab": [], "merges": 3}}'])
def test_a_damaged_tokenizer_is_one_message(copy, content):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"copy: its tokenizer cannot be read: ."):
        Tokenizer(copy)


def test_a_vocabulary_without_merges_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(InputError, match=r"has no `merges\.txt`"):
        Tokenizer(copy)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"type": "Unigram"}, "Unigram"),
        ({"end_of_word_suffix": None}, "BPE without `</w>` at the end of words"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(copy, model, kind):
    words = json.loads((copy / "tokenizer.json").read_text())
    words["model"] |= model
    (copy / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError) as caught:
        Tokenizer(copy)
    assert caught.value.message == f"{copy}: its `tokenizer.json` is of another kind than a CLIP's: {kind}"


def test_a_clip_with_a_file_of_sentencepiece_alone_is_refused(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "spiece.model").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_clip(copy)
    assert (caught.value.message, caught.value.hint) == (
        f"{copy}: has no `tokenizer.json`, but `spiece.model`: a tokenizer of SentencePiece, as no CLIP has",
        "copy the tokenizer that the text tower was trained with, for most that of `openai/clip-vit-base-patch32`",
    )
