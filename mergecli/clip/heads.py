"""The zero-shot head: what the text tower makes of a task's class names and prompts, and the logits it gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergecli.clip.model import Clip, features
from mergecli.errors import InputError


@torch.no_grad()
def zero_shot_head(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, D) unit vectors: each class's prompts through the text tower, normalised, averaged, normalised again.

    The prompts of one class make one batch, padded to its longest, as when the published numbers were made.

    Raises:
        InputError: a prompt has more tokens than the text tower takes.
    """
    limit = int(clip.model.config.text_config.max_position_embeddings)
    rows: list[Tensor] = []
    for name in classes:
        prompts = [template.replace("{}", name) for template in templates]
        batch = clip.tokenizer(prompts, padding=True, return_tensors="pt")
        length = int(batch["input_ids"].shape[1])
        if length > limit:
            longest = max(prompts, key=len)
            raise InputError(
                f"class `{name}`: a prompt has {length} tokens, the text tower takes {limit}: `{longest[:80]}`",
                "shorten the class name or the template",
            )
        pooled = clip.model.text_model(
            input_ids=batch["input_ids"].to(clip.device),
            attention_mask=batch["attention_mask"].to(clip.device),
        ).pooler_output
        text = clip.model.text_projection(pooled)  # (templates, D)
        text = text / text.norm(dim=-1, keepdim=True)
        mean = text.mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def logits(clip: Clip, head: Tensor, pixel_values: Tensor) -> Tensor:
    """(B, C) exp(logit_scale) * cosine of each image with each class."""
    image = features(clip, pixel_values)
    return clip.model.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ head.T
