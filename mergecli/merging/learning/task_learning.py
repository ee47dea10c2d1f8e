"""Learning task by task: from the features that a merged tower and the task's own model give the task's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergecli.clip.pixels import micro_batch_size
from mergecli.merging.learning.work import LearningWork
from mergecli.methods._learned import State
from mergecli.methods._task_learner import TaskLearner
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.runtime.progress import Progress
from mergecli.storage.cache import kept
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.metadata import about

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images

DEVICE_PIECE = 128
"""Images that go through the tower at once on a device beside the processor."""


def learn_tasks(work: LearningWork, folder: Path, progress: Progress | None) -> State:
    """What the method learns for all tasks.

    Each task's part is a file of `folder`, found again by content: an interrupted run resumes with the next task.

    Raises:
        InputError: the towers do not fit the CLIP, an image cannot be read, or features are NaN or infinity.
    """
    from mergecli.storage.safetensors_writer import save_tensors

    method = work.method
    assert isinstance(method, TaskLearner)
    what = method.part_title
    found: list[State] = []
    clip: Clip | None = None
    for task in work.tasks:
        path = part_file(work, folder, task)
        part = kept(path, "it is learned", lambda stored: {key: stored.read(key) for key in stored.entries})
        if part is None:
            clip = clip or _clip(work)
            with interrupts.telling(
                lambda: f"{len(found)} of {len(work.tasks)} tasks are kept" if found else ""
            ):
                part = method.learn_task(_probe(work, clip, task, progress))
            facts = about(f"{what} of one task", task=task, what=f"{what} of {task}")
            save_tensors(part, path, facts, checked=True)
        found.append(part)
    return method.joined(found)


def part_file(work: LearningWork, folder: Path, task: str) -> Path:
    """The file of what is learned for one task."""
    return folder / f"{work.task_key(task)}.safetensors"


def _clip(work: LearningWork) -> Clip:
    """The CLIP without its text tower, on the device."""
    clip = work.load_clip()
    clip.model.to(work.models.device)
    clip.drop_text_tower()
    return clip


def _probe(work: LearningWork, clip: Clip, task: str, progress: Progress | None) -> TowerFeatures:
    images = work.tasks[task].images
    assert images is not None
    towers = {"merged": work.needed["merged_tower"], "own": work.models.tuned[task]}
    return TowerFeatures(clip, task, work.recipe.seed, images, towers, progress)


@dataclass
class TowerFeatures:
    """The `FeatureProbe` of one task: its images, and the CLIP that the towers are put into."""

    clip: Clip
    task: str
    seed: int
    images: Images
    towers: dict[str, Checkpoint]
    progress: Progress | None
    done: int = 0
    """Images that have been through a tower."""

    def features(self, tower: Literal["merged", "own"], /) -> Tensor:
        """(N, D) float32 unit features, on the CPU."""
        import torch

        from mergecli.clip.model import features, set_tower
        from mergecli.clip.pixels import batches

        clip, images, stored, row = self.clip, self.images, self.towers[tower], 0
        result = torch.empty(len(images), int(clip.model.config.projection_dim))
        if not len(images):
            return result
        set_tower(clip, stored)
        with torch.no_grad():
            for batch in batches(
                clip, images, micro_batch_size(clip) if clip.device.type == "cpu" else DEVICE_PIECE
            ):
                image = features(clip, batch).float()
                result[row : row + len(batch)] = image / image.norm(dim=-1, keepdim=True)
                row += len(batch)
                self._tell(len(batch))
        if not bool(result.isfinite().all()):
            raise InputError(
                f"{stored.path}: gives features of {self.task} that are NaN or infinity",
                "its training diverged, or the file is damaged: take an earlier checkpoint",
            )
        return result

    def _tell(self, images: int) -> None:
        self.done += images
        if self.progress is not None:
            text = f"{self.task}: features of the merged and its own model"
            self.progress(text, self.done, 2 * len(self.images))
