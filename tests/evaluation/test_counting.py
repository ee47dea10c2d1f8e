"""Workers by themselves, and several at once that fail or are stopped."""

from __future__ import annotations

import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.clip.heads import zero_shot_head
from mergecli.clip.model import load_clip
from mergecli.clip.pixels import cached_pixels
from mergecli.data import tasks
from mergecli.data.images import load_images
from mergecli.evaluation.counting import Counts, Job, ModelSlot, Worker, counts_file, read_counts
from mergecli.evaluation.evaluate import evaluate
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint


def test_a_worker_saves_counts_once_when_they_are_of_all_images(place, recipe, tmp_path):
    clip, images = load_clip(place / "base"), load_images(tasks.find("more", recipe))
    worker = Worker(ModelSlot(clip), zero_shot_head(clip, ("red", "green", "blue"), ("{}",)))
    batches = list(cached_pixels(clip, images).batches(8))
    saved = []
    with torch.inference_mode(), open_checkpoint(place / "tower.safetensors") as tower:
        job = Job(tower, "more", 20, saved.append)
        assert worker.run(job, batches[:2]) is job.counts
        assert (len(job.counts.labels), saved) == (16, [])
        worker.run(job, batches[2:])
        assert saved == [job]
        whole = worker.run(Job(tower, "more", 20, saved.append), batches)
    assert whole == job.counts
    assert whole.labels == images.labels
    assert job.seconds > 0


def test_a_file_of_counts_has_all_their_digits_and_is_only_for_these_labels(place, recipe, tmp_path):
    counts = Counts(
        [0, 1, 25_000], [0, 2, 25_000], [0.25, 0.5, float(torch.tensor(0.1))], [1 / 3, 2 / 3], [0.1]
    )
    (tmp_path / "counts.safetensors").write_bytes(counts_file(counts, {"what": "counts"}))
    with open_checkpoint(tmp_path / "counts.safetensors", checked=True) as stored:
        assert read_counts(stored, counts.labels) == counts
        assert read_counts(stored, counts.labels[::-1]) is None
        assert stored.metadata["what"] == "counts"


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
    with pytest.raises(
        InputError, match=r"nan\.safetensors: gives NaN or infinite logits on task `more`"
    ) as caught:
        evaluate(towers, recipe=recipe, tasks=["more"], batch_size=1)
    assert "`--precision`" in str(caught.value.hint)
    assert len(seen) < 2 * 20
    assert torch.get_num_threads() == 3


def test_a_ctrl_c_that_a_library_swallowed_ends_all_towers(towers, recipe, monkeypatch):
    def swallow(description: str, done: int, total: int) -> None:
        monkeypatch.setattr(interrupts, "received", signal.SIGINT)

    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(towers[:2], recipe=recipe, tasks=["more"], batch_size=1, progress=swallow)
    assert torch.get_num_threads() == 2
