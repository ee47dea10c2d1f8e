"""The zero-shot head: class embeddings made from a task's class names and prompts, and the logits they give."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergecli.clip.model import Clip, features
from mergecli.clip.tokenizer import Tokenizer
from mergecli.runtime.errors import InputError
from mergecli.storage.alone import alone
from mergecli.storage.cache import cache_path, kept, make_room, touch
from mergecli.storage.checkpoint import VISION, Checkpoint, open_checkpoint
from mergecli.storage.safetensors_writer import save_tensors

_TEXT = ("text_model.", "text_projection.")
_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")  # fmt: skip


_PROCESSING = ("preprocessor_config.json", "processor_config.json")


class ClipDigests(NamedTuple):
    """Digests of a CLIP's parts; together they tell two CLIPs apart."""

    vision: str
    text: str
    """Of the text tower, its projection, the tokenizer and the configuration: all that a head depends on."""
    rest: str
    """The visual projection and the logit scale."""


def clip_digests(folder: Path) -> ClipDigests:
    """The digests of the CLIP in a folder."""
    with open_checkpoint(folder) as stored:
        text = [name for name in stored.entries if name.startswith(_TEXT)]
        rest = [name for name in stored.entries if name not in text and not name.startswith(VISION)]
        parts = [_part(stored, text).digest()]
        for name in _TEXT_FILES:
            with contextlib.suppress(OSError):
                parts.append(f"{name} {sha256((folder / name).read_bytes()).hexdigest()}")
        return ClipDigests(
            stored.vision().digest(),
            sha256("\n".join(parts).encode()).hexdigest(),
            _part(stored, rest).digest(),
        )


def processing_texts(folder: Path) -> list[str]:
    """The files of a CLIP's folder that say how its images are prepared."""
    files = [folder / name for name in _PROCESSING]
    return [file.read_text("utf-8", "replace") for file in files if file.is_file()]


def surroundings(folder: Path, *, head: bool) -> dict[str, str]:
    """Name -> digest of everything but the tower's own weights that its features, or with `head` its logits, depend on in
    this CLIP. Empty for a tower alone, which cannot be run."""
    with open_checkpoint(folder) as stored:
        if not folder.is_dir() or not stored.is_whole_clip:
            return {}
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        found["config"] = _config((folder / "config.json").read_text("utf-8", "replace"))
    if texts := processing_texts(folder):
        found["processing"] = json.dumps(texts)
    if head:
        digests = clip_digests(folder)
        found["head"] = f"{digests.text} {digests.rest}"
    return {name: sha256(each.encode()).hexdigest() for name, each in found.items()}


def _config(text: str) -> str:
    """What `config.json` says of all but the text tower."""
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        return text
    table = known if isinstance(known, dict) else {}
    return json.dumps(
        {key: each for key, each in table.items() if not key.startswith("text_")}, sort_keys=True
    )


def head_key(clip: Clip, text: str, classes: Sequence[str], templates: Sequence[str]) -> str:
    """32 hex digits of all that the head depends on; `text` is `ClipDigests.text`.

    The kind of device and the version of torch are part of it, since others round differently; and so does the forward pass
    of earlier versions, which was that of transformers.
    """
    about = [clip.computed_by, text, list(classes), list(templates), clip.device.type, torch.__version__]
    return sha256(json.dumps(about).encode()).hexdigest()[:32]


def has_head(clip: Clip, text: str, classes: Sequence[str], templates: Sequence[str], max_size: int) -> bool:
    """Whether `cached_head` finds the head in the cache."""
    return bool(max_size) and cache_path("heads", head_key(clip, text, classes, templates)).exists()


def cached_head(
    clip: Clip, classes: Sequence[str], templates: Sequence[str], text: str, max_size: int
) -> Tensor:
    """(C, D) `zero_shot_head`, from the cache if it is there; else it is made and put there.

    Args:
        text: `ClipDigests.text` of the CLIP.
        max_size: bytes that the cache may take; 0 uses none.
    """
    path = cache_path("heads", head_key(clip, text, classes, templates))

    def stored() -> Tensor | None:
        head = kept(path, "it is made", lambda file: file.read("head")) if max_size else None
        if head is None or head.shape[0] != len(classes):
            return None
        touch(path)
        return head.to(clip.device)

    if (head := stored()) is not None:
        return head
    with alone(path) if max_size else contextlib.nullcontext():
        if (head := stored()) is not None:  # another process has made it meanwhile
            return head
        head = zero_shot_head(clip, classes, templates)
        if make_room(head.nbytes, max_size):
            named = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
            what = f"{len(classes)} classes ({named}), {len(templates)} prompts each, {clip.path.name}"
            with contextlib.suppress(InputError):
                save_tensors({"head": head.cpu()}, path, {"what": what}, checked=True)
        return head


@torch.no_grad()
def zero_shot_head(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, D) unit vectors: each class's prompts through the text tower, normalized, averaged, normalized again.

    The prompts of one class are one batch, padded to its longest, as when the published numbers were made: another padding
    rounds differently.

    Raises:
        InputError: a prompt has more tokens than the text tower takes.
    """
    rows: list[Tensor] = []
    for name in classes:
        tokens = _tokens(clip, name, templates)
        text = clip.text(**{part: each.to(clip.device) for part, each in tokens.items()})  # (templates, D)
        text = text / text.norm(dim=-1, keepdim=True)
        mean = text.mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def check_prompts(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> None:
    """Raises InputError if the text tower cannot read one of the prompts: found before the work."""
    for name in classes:
        _tokens(clip, name, templates)


def _tokens(clip: Clip, name: str, templates: Sequence[str]) -> Mapping[str, Tensor]:
    """What the text tower takes of a class's prompts: (templates, S) tokens, known to be some that it can read, and for
    other dual encoders what else their tokenizer says of them."""
    limit = clip.model.config.text_config.max_position_embeddings
    prompts = [template.replace("{}", name) for template in templates]
    tokenizer = clip.tokenizer
    if isinstance(tokenizer, Tokenizer):
        tokens = tokenizer(prompts)
        end, found = tokenizer.eos_token_id, {"tokens": tokens}
    else:
        found = tokenizer(prompts)
        limit, end, tokens = tokenizer.limit, None, found["input_ids"]
    length = tokens.shape[1]
    if length > limit:
        longest = max(prompts, key=len)
        raise InputError(
            f"class `{name}`: a prompt has {length} tokens, the text tower takes {limit}: `{longest[:80]}`",
            "shorten the class name or the template",
        )
    _expect_tokens(clip, name, prompts, tokens, end)
    return found


def _expect_tokens(
    clip: Clip, name: str, prompts: Sequence[str], tokens: Tensor, own_end: int | None
) -> None:
    """Raises InputError if the text tower has no row for a token, or would not find a prompt's end, where it reads the
    prompt's feature: it takes the place of the end that its configuration names, or for a 2, as old ones have it, that
    of the largest token."""
    config = clip.model.config.text_config
    rows = config.vocab_size
    hint = "the tokenizer is another model's, or has tokens that were added to it: copy the base's own"
    largest, which = tokens.amax(dim=1).max(dim=0)
    if int(largest) >= rows:
        raise InputError(
            f"class `{name}`: a prompt has token {int(largest)}, the text tower knows tokens up to {rows - 1}: "
            f"`{prompts[int(which)][:80]}`",
            hint,
        )
    if own_end is None:  # other text towers read the feature elsewhere
        return
    end = config.eos_token_id
    found = tokens.amax(dim=1) == own_end if end == 2 else (tokens == end).any(dim=1)
    if not bool(found.all()):
        raise InputError(
            f"class `{name}`: the text tower does not find the end of a prompt, "
            f"{'the largest token' if end == 2 else f'token {end}'}: `{prompts[int(found.int().argmin())][:80]}`",
            hint,
        )


def logits(
    clip: Clip,
    head: Tensor,
    pixel_values: Tensor,
    correction: Callable[[Tensor], Tensor] | None = None,
    learned: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(B, C) exp(logit_scale) * cosine of each image with each class; in float32, whatever the tower's dtype.

    A `correction` changes the (B, D) unit image features first, which are not normalized again. A `learned` head gives
    the logits of unit features in place of the zero-shot head.
    """
    return compare(clip, features(clip, pixel_values), head, correction, learned)


def compare(
    clip: Clip,
    image: Tensor,
    head: Tensor,
    correction: Callable[[Tensor], Tensor] | None = None,
    learned: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(B, C) the logits of (B, D) image features; NaN where the norm of a feature is infinite, which would give 0 for all classes."""
    image = image.float()
    norm = image.norm(dim=-1, keepdim=True)
    image = image / norm.masked_fill(norm.isinf(), torch.nan)
    if correction is not None:
        image = correction(image)
    if learned is not None:
        return learned(image)
    return clip.model.logit_scale.exp() * image @ head.T


def _part(stored: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """A checkpoint with only these of the tensors, and a digest of its own."""
    return replace(
        stored, entries={name: stored.entries[name] for name in names}, hashes=stored.hashes.anew()
    )
