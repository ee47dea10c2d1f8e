"""A CLIP's tokenizer, as its folder writes it, by the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergecli.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""What becomes of a text before byte pairs are joined, in Radford et al. (2021)."""
OWN = (
    "copy the tokenizer that the text tower was trained with, for most that of `openai/clip-vit-base-patch32`"
)
FEWEST = 10
"""Tokens that a tokenizer knows at least."""


class Tokenizer:
    """Prompts to tokens, as `transformers.CLIPTokenizer` makes them of the same files."""

    def __init__(self, folder: Path) -> None:
        """The tokenizer in a folder: `tokenizer.json`, or `vocab.json` with `merges.txt`.

        Raises:
            InputError: a file is missing or damaged.
        """
        from tokenizers import Regex, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Library
        from tokenizers.models import BPE

        try:
            names = _special(folder)
            vocabulary, merges, added = _words(folder)
            self._library = Library(
                BPE(
                    vocabulary,
                    merges,
                    continuing_subword_prefix="",
                    end_of_word_suffix="</w>",
                    unk_token=names["unk_token"],
                )
            )
            self._library.normalizer = normalizers.Sequence(
                [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
            )
            self._library.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
            self.add_tokens(added, special=False)
            self.add_tokens([*dict.fromkeys(names.values())], special=True)
            self.eos_token_id = self._number(names["eos_token"])
            self._library.post_processor = processors.RobertaProcessing(
                (names["eos_token"], self.eos_token_id),
                (names["bos_token"], self._number(names["bos_token"])),
                trim_offsets=False,
                add_prefix_space=False,
            )
        except InputError:
            raise
        except Exception as error:  # the library raises plain `Exception`
            raise InputError(
                f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}"
            ) from error
        if len(self) < FEWEST:
            raise InputError(f"{folder}: its tokenizer knows only {len(self)} tokens", "fetch the base again")

    def __len__(self) -> int:
        """How many tokens it knows."""
        return self._library.get_vocab_size(with_added_tokens=True)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(N, S) int64: the tokens of each prompt between start and end; shorter ones are filled up with ends."""
        import torch

        found = [each.ids for each in self._library.encode_batch(list(prompts))]
        longest = max(map(len, found), default=0)
        return torch.tensor([each + [self.eos_token_id] * (longest - len(each)) for each in found])

    def add_tokens(self, tokens: Sequence[str], *, special: bool = False) -> None:
        """Adds words that are one token each, unless it knows them."""
        from tokenizers import AddedToken

        words = [AddedToken(each, special=special, normalized=not special) for each in tokens]
        (self._library.add_special_tokens if special else self._library.add_tokens)(words)

    def _number(self, token: str) -> int:
        found = self._library.token_to_id(token)
        assert found is not None, "special tokens are added"
        return found


def _special(folder: Path) -> dict[str, str]:
    """The special tokens; `tokenizer_config.json` counts before `special_tokens_map.json`."""
    usual = {"unk_token": _END, "bos_token": _START, "eos_token": _END, "pad_token": _END}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        table = _table(folder / file)
        for name in usual:
            value = table.get(name)
            if isinstance(value, dict):
                value = cast("dict[str, Any]", value).get("content")
            if isinstance(value, str):
                usual[name] = value
    return usual


def _words(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """Word -> token, the pairs that are joined, and words that were added behind them."""
    from tokenizers.models import BPE

    if (folder / "tokenizer.json").is_file():
        table: Any = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        kind, end = table["model"].get("type", "BPE"), table["model"].get("end_of_word_suffix", "</w>")
        if kind != "BPE" or end != "</w>":
            found = kind if kind != "BPE" else "BPE without `</w>` at the end of words"
            raise InputError(f"{folder}: its `tokenizer.json` is of another kind than a CLIP's: {found}", OWN)
        merges = [
            cast("tuple[str, str]", tuple(each.split(" ") if isinstance(each, str) else each))
            for each in table["model"]["merges"]
        ]
        vocabulary: dict[str, int] = table["model"]["vocab"]
        added = [
            (each["id"], each["content"]) for each in table.get("added_tokens") or () if not each["special"]
        ]
        return vocabulary, merges, [content for _, content in sorted(added)]
    if not (folder / "merges.txt").is_file():
        raise InputError(f"{folder}: has no `merges.txt`", "fetch or copy the whole repository of the base")
    vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    added = _table(folder / "added_tokens.json")
    return vocabulary, merges, sorted(added, key=lambda each: added[each])


def _table(file: Path) -> Mapping[str, Any]:
    """The table of a JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    found: Any = json.loads(file.read_text("utf-8"))
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
