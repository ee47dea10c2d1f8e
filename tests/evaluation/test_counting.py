"""Workers by themselves, and several at once that fail or are stopped."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.clip.heads import zero_shot_head
from mergecli.clip.model import load_clip
from mergecli.clip.pixels import cached_pixels
from mergecli.data import tasks
from mergecli.data.images import load_images
from mergecli.evaluation.counting import Counts, CountsFile, Job, ModelSlot, Worker, load_counts
from mergecli.evaluation.evaluate import evaluate
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint


def test_a_worker_saves_counts_once_they_are_of_all_images(place, recipe, tmp_path):
    clip, images = load_clip(place / "base"), load_images(tasks.find("more", recipe))
    worker = Worker(ModelSlot(clip), zero_shot_head(clip, ("red", "green", "blue"), ("{}",)))
    batches = list(cached_pixels(clip, images).batches(8))
    file = CountsFile(tmp_path / "counts.safetensors", "counts", 10**9)
    with torch.inference_mode(), open_checkpoint(place / "tower.safetensors") as tower:
        job = Job(tower, "more", 20, file)
        assert worker.run(job, batches[:2]) is job.counts
        assert len(job.counts.labels) == 16
        assert load_counts(file, images.labels) is None
        worker.run(job, batches[2:])
        assert load_counts(file, images.labels) == job.counts
        assert load_counts(file, images.labels[::-1]) is None
        whole = worker.run(Job(tower, "more", 20, file._replace(max_size=0)), batches)
    assert whole == job.counts
    assert whole.labels == images.labels


@pytest.fixture
def towers(place, tmp_path):
    """Three towers, the last of which gives NaN."""
    weights = load_file(place / "tower.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    return [place / "tower.safetensors", place / "vector.safetensors", tmp_path / "nan.safetensors"]


def test_an_error_of_one_tower_ends_those_beside_it(towers, recipe, monkeypatch):
    seen: list[int] = []
    add = Counts.add

    def slow(self, logits, labels):
        if not logits.isnan().any():
            seen.append(len(labels))
            time.sleep(0.05)
        return add(self, logits, labels)

    monkeypatch.setattr(Counts, "add", slow)
    torch.set_num_threads(3)
    with pytest.raises(InputError, match=r"nan\.safetensors: gives NaN or infinite logits on task `more`"):
        evaluate(towers, recipe=recipe, tasks=["more"], batch_size=1)
    assert len(seen) < 2 * 20
    assert torch.get_num_threads() == 3


def test_a_ctrl_c_that_a_library_swallowed_ends_all_towers(towers, recipe, monkeypatch):
    def swallow(description: str, done: int, total: int) -> None:
        monkeypatch.setattr(interrupts, "pressed", True)

    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(towers[:2], recipe=recipe, tasks=["more"], batch_size=1, progress=swallow)
    assert torch.get_num_threads() == 2
