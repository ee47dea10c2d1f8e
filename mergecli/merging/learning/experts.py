"""What each task's own model predicts for the images that a merged model adapts on; computed once and kept."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from mergecli.merging.learning.work import LearningWork
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.storage.cache import kept
from mergecli.storage.metadata import about
from mergecli.storage.store import home

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels

KIND = "experts"
"""The folder of the store."""


class ExpertLabels(NamedTuple):
    """Predictions of a task's own model, with its zero-shot head, on the CPU."""

    labels: Tensor
    """(N,) the class of each image."""
    confidences: Tensor
    """(N,) float32, its probability."""


def expert_labels(work: LearningWork, clip: Clip, task: str, pixels: Pixels, head: Tensor) -> ExpertLabels:
    """The predictions for all images of a task, from the store or by a pass of the task's model over them.

    The CLIP's tower has the base's weights afterwards. Predictions depend on model, images, class names and prompts,
    and on no setting of the method, so that every method finds them again.

    Args:
        head: (C, D) unit vectors.

    Raises:
        InputError: the model does not fit the CLIP, or gives NaN or infinity.
    """
    from mergecli.storage.safetensors_writer import save_tensors

    path = home() / KIND / f"{_key(work, task)}.safetensors"
    found = kept(
        path, "it is computed", lambda stored: {key: stored.read(key) for key in ("labels", "confidences")}
    )
    if found is None:
        computed = _predicted(work, clip, task, pixels, head)
        found = computed._asdict()
        facts = about("expert's predictions", task=task, inputs={task: work.models.tuned[task].digest()})
        save_tensors(found, path, facts, checked=True)
    return ExpertLabels(found["labels"].long(), found["confidences"])


def _predicted(work: LearningWork, clip: Clip, task: str, pixels: Pixels, head: Tensor) -> ExpertLabels:
    import torch

    from mergecli.clip.model import check_tower, features, set_tower
    from mergecli.clip.pixels import micro_batch_size
    from mergecli.clip.preprocessing import Normalization

    stored, base = work.models.tuned[task], work.models.base
    assert base is not None
    check_tower(clip, stored)
    set_tower(clip, stored)
    normalized, size = Normalization(clip), micro_batch_size(clip)
    labels, confidences = torch.empty(len(pixels), dtype=torch.int64), torch.empty(len(pixels))
    with torch.no_grad():
        for start in range(0, len(pixels), size):
            interrupts.check()
            rows = torch.arange(start, min(start + size, len(pixels)))
            image = features(clip, normalized(pixels.rows(rows)))
            image = clip.model.logit_scale.exp() * image / image.norm(dim=-1, keepdim=True)
            probability, label = (image @ head.T).float().softmax(1).max(1)
            labels[rows], confidences[rows] = label.cpu(), probability.cpu()
    set_tower(clip, base)
    if not bool(confidences.isfinite().all()):
        raise InputError(
            f"{stored.path}: gives predictions of {task} that are NaN or infinity",
            "look at the weights with `mergecli info`",
        )
    return ExpertLabels(labels, confidences)


def _key(work: LearningWork, task: str) -> str:
    """32 hex digits of everything that the predictions depend on."""
    from mergecli.clip.heads import processing_texts

    assert work.models.base is not None
    facts = [
        work.models.base.digest(), work.clip_digests, processing_texts(work.clip_folder),
        work.models.tuned[task].digest(), work.looked_at[task],
    ]  # fmt: skip
    return sha256(json.dumps(facts).encode()).hexdigest()[:32]
