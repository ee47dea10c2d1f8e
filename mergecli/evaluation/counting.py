"""Counts: which class each of several vision towers gives each image of one task, and the losses."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mergecli.clip.pixels import micro_batch_size
from mergecli.formats.mixture import mixture_of
from mergecli.methods._mixture import Installed, Routing
from mergecli.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels
    from mergecli.evaluation.features import LayerFeatures
    from mergecli.evaluation.routes import RouteSums
    from mergecli.storage.checkpoint import Checkpoint

    Batches = Iterable[tuple[Tensor, Tensor]]

AT_ONCE = 4
"""Towers that are evaluated at once, at most: each has its own weights in memory."""


@dataclass
class Counts:
    """What one tower has made of one task's images so far."""

    labels: list[int] = field(default_factory=list[int])
    chosen: list[int] = field(default_factory=list[int])
    """The class with the highest logit."""
    probabilities: list[float] = field(default_factory=list[float])
    """Of the chosen class."""
    batch_losses: list[float] = field(default_factory=list[float])
    """Sum of the losses of each batch."""
    batch_means: list[float] = field(default_factory=list[float])
    """Mean loss of each batch."""

    @property
    def correct(self) -> int:
        """How many of the chosen classes are the labels."""
        return sum(label == chosen for label, chosen in zip(self.labels, self.chosen, strict=True))

    @property
    def loss(self) -> float:
        """Mean over the images."""
        return sum(self.batch_losses) / len(self.labels)

    @property
    def loss_batch_mean(self) -> float:
        """Mean over the batches of their means."""
        return sum(self.batch_means) / len(self.batch_means)

    def add(self, logits: Tensor, labels: Tensor) -> bool:
        """Adds one batch of (B, C) logits and (B,) labels: the prediction of an image is the class of its highest logit, of equal
        ones the first. False if a loss is NaN or infinite."""
        import torch

        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
        self.labels += labels.tolist()
        self.chosen += logits.argmax(dim=1).tolist()
        self.probabilities += torch.softmax(logits, dim=1).amax(dim=1).tolist()
        self.batch_losses.append(float(losses.sum()))
        self.batch_means.append(float(losses.mean()))
        return bool(losses.isfinite().all())


def counts_file(counts: Counts, metadata: Mapping[str, str], logits: Sequence[Tensor] | None = None) -> bytes:
    """The counts as the bytes of a safetensors file with checksums; with the (B, C) `logits` of all batches, if they are kept."""
    import torch

    from mergecli.storage.safetensors_writer import save_tensors

    dtypes = {"labels": torch.int32, "chosen": torch.int32, "probabilities": torch.float32}
    tensors = {
        each.name: torch.tensor(getattr(counts, each.name), dtype=dtypes.get(each.name, torch.float64))
        for each in fields(Counts)
    }
    if logits is not None:
        tensors["logits"] = torch.cat(list(logits))
    with TemporaryDirectory(prefix="mergecli-counts-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "counts.safetensors"
        save_tensors(tensors, path, metadata, checked=True)
        return path.read_bytes()


def read_counts(stored: Checkpoint, labels: Sequence[int]) -> Counts | None:
    """The counts in a file; None if they have other labels."""
    counts = Counts(**{each.name: stored.read(each.name).tolist() for each in fields(Counts)})
    fits = counts.labels == list(labels) and len(counts.chosen) == len(labels)
    return counts if fits else None


@dataclass
class Job:
    """One tower on the images of one task."""

    checkpoint: Checkpoint
    task: str
    images: int
    """How many there are, over all runs of the job."""
    save: Callable[[Job], None]
    """Called once, when the counts are of all images."""
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    """That its runs have taken."""
    features: LayerFeatures | None = None
    """What saves the features of every layer, if they are wanted."""
    routes: RouteSums | None = None
    """What sums up the routing weights, if they are wanted."""
    logits: list[Tensor] | None = None
    """Those of all batches, if they are kept."""
    tasks: list[int] = field(default_factory=list[int])
    """The number of the task that the tower found for each image; empty if it does not look for one."""


class ModelSlot:
    """A CLIP with room for one vision tower at a time."""

    def __init__(self, clip: Clip, routing: Routing = "sample") -> None:
        self.clip = clip
        self.routing: Routing = routing
        """How towers that route do so."""
        self.correction: Callable[[Tensor], Tensor] | None = None
        """What changes the image features of the tower and task."""
        self.head: Callable[[Tensor], Tensor] | None = None
        """What takes the place of the task's zero-shot head."""
        self.installed: Installed | None = None
        """The routing layers of the tower that is in."""
        self._projection: nn.Linear | None = None
        """The CLIP's visual projection, while each image has its own."""
        self._taken: tuple[Checkpoint, str] | None = None

    @property
    def keeps_batches_whole(self) -> bool:
        """Whether the logits of an image depend on the other images of its batch."""
        return self.installed is not None and self.installed.keeps_batches_whole

    def take(self, checkpoint: Checkpoint, task: str) -> None:
        """Puts a checkpoint's weights in, of a mixture those for the task, unless they are there already."""
        from mergecli.clip.model import set_tower

        if self._taken and self._taken[0] is checkpoint:
            serves_all = self.installed is not None or not checkpoint.is_mixture
            if serves_all or self._taken[1] == task:
                return
        self.release()
        if not checkpoint.is_mixture:
            set_tower(self.clip, checkpoint)
        else:
            mixture = mixture_of(checkpoint)
            if mixture.is_routed:
                set_tower(self.clip, mixture.shared)
                self.installed = mixture.install(self.clip.tower, self.routing)
                self._projection = mixture.project(self.clip.model, self.installed)
            else:
                set_tower(self.clip, mixture.of_task(task))
                self.correction = mixture.correction(task, self.clip.device)
                self.head = mixture.head(task, self.clip.device)
        self._taken = checkpoint, task

    def release(self) -> None:
        """Leaves a plain tower, whose weights no longer matter."""
        if self.installed is not None:
            self.installed.remove()
        if self._projection is not None:
            self.clip.model.visual_projection = self._projection
            self._projection = None
        self._taken = self.installed = self.correction = self.head = None

    def another(self) -> ModelSlot:
        """A slot that shares everything with this one but the weights of the tower and its projection."""
        self.release()
        model, own = self.clip.model, ("vision_model", "visual_projection")
        shared = {id(part): part for name, part in model.named_children() if name not in own}
        return ModelSlot(replace(self.clip, model=copy.deepcopy(model, shared)), self.routing)


_saving = threading.Lock()


def saves_finished_counts(
    run: Callable[[Worker, Job, Batches], Counts],
) -> Callable[[Worker, Job, Batches], Counts]:
    """`Worker.run`, which saves the counts once they are of all images."""

    @functools.wraps(run)
    def run_and_save(worker: Worker, job: Job, batches: Batches) -> Counts:
        started = time.perf_counter()
        counts = run(worker, job, batches)
        job.seconds += time.perf_counter() - started
        if len(counts.labels) == job.images:
            with _saving:  # two workers that make room at once would both remove files
                job.save(job)
        return counts

    return run_and_save


class Worker:
    """A model slot that runs one job after another, all of them with the (C, D) head of one task."""

    def __init__(self, slot: ModelSlot, head: Tensor) -> None:
        from mergecli.clip.preprocessing import Normalization

        self._slot, self._head, self._normalize = slot, head, Normalization(slot.clip)
        on_processor = head.device.type == "cpu"
        self._most: int | None = micro_batch_size(slot.clip) if on_processor else None
        """Images that pass through the tower at a time; None is a whole batch."""

    @saves_finished_counts
    def run(self, job: Job, batches: Batches) -> Counts:
        """Adds (B, 3, H, W) uint8 images and their (B,) labels to the job's counts, which it returns.

        A batch is counted only after the next one was sent to the device: to read logits is to wait for the device, which
        would then have nothing to do while Python counts and fetches images.

        Raises:
            InputError: logits are NaN or infinite, or one image alone takes too much memory.
        """
        self._slot.take(job.checkpoint, job.task)
        seen = len(job.counts.labels)
        uncounted: tuple[Tensor, Tensor] | None = None
        for pixels, labels in batches:
            pinned = pixels.pin_memory() if self._head.is_cuda else pixels
            logits = self.logits(self._normalize(pinned), job, seen)
            seen += len(labels)
            if uncounted is not None:
                _add(job, *uncounted)
            uncounted = logits, labels
        if uncounted is not None:
            _add(job, *uncounted)
        return job.counts

    def logits(
        self,
        pixel_values: Tensor,
        job: Job | None = None,
        first: int = 0,
    ) -> Tensor:
        """(B, C) float32 logits of the tower that is in the slot; `first` is the number of the batch's first image, and what the
        job wants besides logits is added to it.

        On a processor the batch passes in micro-batches whose activations fit into its cache. On a GPU it is one, until the
        memory does not suffice: then it is tried again in halves. A tower that routes whole batches gets whole ones.

        Raises:
            InputError: the memory does not suffice, and the batch cannot be divided further.
        """
        import torch

        features, routes = (job.features, job.routes) if job else (None, None)
        while True:
            divisible = self._most is not None and not self._slot.keeps_batches_whole
            count = -(-len(pixel_values) // (self._most or 1)) if divisible else 1
            micro_batches = pixel_values.tensor_split(count)
            try:
                with features.of_images_from(first) if features else nullcontext():
                    found = [self._micro_batch(each, watched=routes is not None) for each in micro_batches]
            except torch.cuda.OutOfMemoryError as error:
                if len(micro_batches[0]) == 1 or self._slot.keeps_batches_whole:
                    raise InputError(
                        "the device has too little memory for so many images", "use a smaller `--batch-size`"
                    ) from error
                self._most = (len(micro_batches[0]) + 1) // 2
                torch.cuda.empty_cache()
                continue
            if job is not None:  # only now: a micro-batch before one that failed would count twice
                for (_, weights, tasks), images in zip(found, micro_batches, strict=True):
                    if routes is not None:
                        routes.add(weights, len(images))
                    job.tasks += [] if tasks is None else tasks.tolist()
            return torch.cat([logits for logits, _, _ in found])

    def _micro_batch(
        self, pixel_values: Tensor, watched: bool
    ) -> tuple[Tensor, Mapping[str, Tensor], Tensor | None]:
        """(B, C) logits, the routing weights of every layer if they are watched, and the task found for each image."""
        from mergecli.clip.heads import logits

        slot = self._slot
        found = logits(slot.clip, self._head, pixel_values, slot.correction, slot.head)
        installed = slot.installed
        routes = installed.routes() if installed and watched else {}
        return found, routes, installed.chosen if installed else None


def _add(job: Job, logits: Tensor, labels: Tensor) -> None:
    own = logits.cpu()
    if job.logits is not None:
        job.logits.append(own)
    if not job.counts.add(own, labels):
        raise InputError(
            f"{job.checkpoint.path}: gives NaN or infinite logits on task `{job.task}`",
            "its training diverged, the file is damaged, or `--precision` is too narrow: `float32` is the widest",
        )


def count(
    slots: list[ModelSlot],
    jobs: Sequence[Job],
    head: Tensor,
    chunks: Iterable[Pixels],
    batch_size: int,
    progress: Callable[[int], None],
) -> None:
    """Runs the jobs, all on the same images, which come in chunks; `progress` is told how many more images a tower has seen.

    On a processor up to `AT_ONCE` towers are evaluated at once, each by a thread with its share of the cores: that is faster
    than all cores on one tower, whose small matrix products do not keep them busy. Jobs that are left over when every worker
    has had as many as the others come last, with all cores on each.

    Args:
        slots: as many as there have been needed so far; grows.
    """
    import torch

    lock = threading.Lock()
    stop = threading.Event()

    def batches(chunk: Pixels) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in chunk.batches(batch_size):
            if stop.is_set():
                return
            yield pixels, labels
            with lock:
                progress(len(labels))

    several = slots[0].clip.device.type == "cpu" and not any(job.features for job in jobs)
    wanted = min(AT_ONCE, torch.get_num_threads(), len(jobs)) if several else 1
    while len(slots) < wanted:
        slots.append(slots[0].another())
    workers = [Worker(slot, head) for slot in slots[:wanted]]
    at_once = len(jobs) - len(jobs) % len(workers) if len(workers) > 1 else 0
    for chunk in chunks:
        if at_once:
            _run_at_once(workers, [(job, batches(chunk)) for job in jobs[:at_once]], stop)
        for job in jobs[at_once:]:
            workers[0].run(job, batches(chunk))


def _run_at_once(
    workers: Sequence[Worker], runs: Sequence[tuple[Job, Batches]], stop: threading.Event
) -> None:
    """Runs each of the jobs by the worker that is free first; after an error or Ctrl-C, `stop` ends the others' batches."""
    import torch

    threads = torch.get_num_threads()
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(job: Job, batches: Batches) -> None:
        worker = free.get()
        try:
            with torch.inference_mode():  # it holds for the thread that enters it
                worker.run(job, batches)
        finally:
            free.put(worker)

    share = max(1, threads // len(workers))
    pool = ThreadPoolExecutor(len(workers), initializer=torch.set_num_threads, initargs=(share,))
    try:
        running = [pool.submit(run, *each) for each in runs]
        wait(running, return_when=FIRST_EXCEPTION)
    finally:
        stop.set()  # after an error, or Ctrl-C, which reaches this thread only
        pool.shutdown(cancel_futures=True)
        stop.clear()
        torch.set_num_threads(threads)
    for each in running:
        each.result()
