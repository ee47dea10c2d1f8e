"""Statistics made: the images that a method looks at, and one file of what it measures on them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.errors import InputError, UsageError
from mergecli.output import SafetensorsWriter
from mergecli.sources import locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip
    from mergecli.clip.tasks import Task
    from mergecli.methods._calibrated import Calibrated
    from mergecli.models import Models
    from mergecli.progress import Progress
    from mergecli.recipe import Recipe


@dataclass(frozen=True)
class Subject:
    """A task and its images; None where they are not on this machine."""

    name: str
    task: Task | None = None
    images: Images | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What tells these images, and the head where that is used, from others."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes."""
        own = self.task.classes if self.task else None
        return own or (self.images.classes if self.images else None) or ()


def subject(name: str, method: Calibrated, recipe: Recipe, *, may_lack: bool) -> Subject:
    """A task and its images; with `may_lack` perhaps without them.

    Raises:
        UsageError: there is no such task, or no such split. InputError: the images are missing or damaged.
    """
    from mergecli.clip.images import load_images
    from mergecli.clip.tasks import digest, find

    try:
        task = find(name, recipe)
        if task.data.kind != "toy":
            locate(task.data)
    except (UsageError, InputError):
        if may_lack:
            return Subject(name)
        raise
    images = load_images(
        task, {"train": task.train_split, "test": task.split}.get(method.split, method.split)
    )
    found = Subject(name, task, images)
    facts: dict[str, Any] = {"split": images.split, "images": min(method.examples, len(images))}
    facts["data"] = images.fingerprint
    if method.needs_head:
        facts |= {"classes": digest(found.classes), "templates": digest(task.templates)}
    return replace(found, facts=facts)


class Laboratory:
    """A CLIP that takes one task's tower after another, and measures."""

    def __init__(
        self, method: Calibrated, models: Models, recipe: Recipe, subjects: Sequence[Subject]
    ) -> None:
        from mergecli.clip.heads import zero_shot_head
        from mergecli.clip.model import check_tower, load_clip

        assert recipe.base is not None
        self._method, self._models, self._seed = method, models, recipe.seed
        self._clip: Clip = load_clip(locate(recipe.base))
        for each in models.tuned.values():
            check_tower(self._clip, each)
        self._clip.model.to(models.device)
        self._heads = {
            each.name: zero_shot_head(self._clip, each.classes, each.task.templates)
            for each in subjects
            if each.task and method.needs_head
        }
        del self._clip.model.text_model  # no longer used, and as large as a tower

    def write(
        self, path: Path, subjects: Sequence[Subject], metadata: Mapping[str, str], progress: Progress | None
    ) -> None:
        """Measures the tasks, and writes what comes out as one file, tensor by tensor as it is known.

        Raises:
            InputError: a model gives NaN or infinity, or an image cannot be read.
        """
        reference = self._models.reference.entries
        layout = self._method.layout({name: reference[name].shape for name in self._models.floats})
        title = subjects[0].name if len(subjects) == 1 else f"{len(subjects)} tasks"

        def tell(done: int, total: int) -> None:
            if progress:
                progress(f"{title}: measuring", done, total)

        with ExitStack() as stack:
            writer = stack.enter_context(SafetensorsWriter(path, layout, metadata))
            measured = stack.enter_context(closing(self._measured(subjects, path.parent, tell)))
            for name, value in measured:
                if not bool(value.isfinite().all()):
                    raise InputError(
                        f"{title}: `{name}` comes out as NaN or infinity",
                        "look at the weights with `mergecli info`",
                    )
                writer.write(name, value.detach().cpu().contiguous())

    def _measured(
        self, subjects: Sequence[Subject], folder: Path, tell: Callable[[int, int], None]
    ) -> Generator[tuple[str, Tensor]]:
        from mergecli.clip.model import set_tower
        from mergecli.clip.probe import JointTowerProbe, Scratch, TowerProbe
        from mergecli.clip.selection import drawn

        method, models = self._method, self._models
        seed = self._seed if method.shuffle else None
        chosen = [drawn(each.images, method.examples, seed) for each in subjects if each.images]
        assert len(chosen) == len(subjects), "images are missing"
        with ExitStack() as stack:
            scratch = Scratch(folder, stack)
            if method.joint:
                assert models.base is not None
                tuned = tuple(models.tuned.values())
                joint = JointTowerProbe(self._clip, tuned, models.base, chosen, scratch, tell)
                yield from method.measure_jointly(joint)
                return
            (one,) = subjects
            set_tower(self._clip, models.tuned[one.name])
            probe = TowerProbe(self._clip, chosen[0], self._heads.get(one.name), scratch, tell)
            yield from method.measure(probe)
