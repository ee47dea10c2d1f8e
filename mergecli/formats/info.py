"""`info`: what a checkpoint or an adapter is, from its header alone, and its digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergecli.data.contamination import findings_of
from mergecli.formats.coefficients import Coefficients, coefficients_of
from mergecli.formats.lora_files import Adapter, is_adapter, open_adapter
from mergecli.formats.mixture import mixture_of
from mergecli.formats.open_clip_names import read_through
from mergecli.formats.opening import is_model, model_path, open_source
from mergecli.formats.quantized import about_quantization, dequantized
from mergecli.runtime.errors import InputError
from mergecli.storage.atomic import check_targets
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.sources import Source, parse_source


@dataclass(frozen=True)
class Info:
    """What is known of a checkpoint."""

    path: str
    kind: str
    """`checkpoint`, `task vector`, `adapter`, `mixture`, or what else its metadata says."""
    parameters: int
    """Entries of all floating point tensors; of a whole CLIP, of its vision tower."""
    whole_clip: bool
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name -> dtype and shape."""
    dtypes: Mapping[str, int]
    """dtype -> number of entries."""
    files: int
    """0 of a task's tower in a mixture, which has no file of its own."""
    size: int
    """Bytes on disk; of a task's tower in a mixture, those of its tensors in the file's dtypes."""
    digest: str
    metadata: Mapping[str, str]
    is_model: bool = True
    """Whether it can be merged and evaluated, as far as its kind says."""
    adapter: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of an adapter: its method, rank, scaling, modules and base."""
    coefficients: Coefficients | None = None
    """What the method learned for each task and tensor: of a file of coefficients, and of what was merged with them if the store
    still has them."""
    mixture: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of a mixture: its tasks, whether it routes or is task-conditioned, and how large it is beside one tower."""
    quantized: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of a file of quantized tensors: bits, what they lose, and the file that it shares with others; its tensors and its digest
    are those that it is read as. Of what was merged from such files: how many, and what they lost."""
    warnings: tuple[str, ...] = ()
    """What speaks against its use."""

    @property
    def inputs(self) -> dict[str, str]:
        """Input -> digest, for files that mergecli wrote."""
        return inputs_of(self.metadata)


def info(checkpoint: str | Path, *, plot: str | Path | None = None) -> Info:
    """What the checkpoint is, how large, with which tensors, and where it says it comes from.

    `FILE#TASK` is the tower that a mixture has for a task: it is computed for its digest, and has no file of its own.

    Args:
        plot: a heat-map of the learned coefficients, tasks by layers (PNG, SVG or PDF by its suffix).

    Raises:
        InputError: it is missing or damaged, there is no tower for the task, or with `plot` no coefficients are known.
        UsageError: the picture cannot be written.
    """
    if plot is None:
        return _opened(checkpoint)
    from mergecli.results.plots import require_matplotlib

    require_matplotlib(Path(plot))
    check_targets([(Path(plot), ())], {})
    found = _opened(checkpoint)
    known_coefficients(found).plot(Path(plot))
    return found


def known_coefficients(found: Info) -> Coefficients:
    """The learned coefficients; raises InputError if there are none, or not here."""
    if found.coefficients is not None:
        return found.coefficients
    if digest := found.inputs.get("coefficients"):
        raise InputError(
            f"{found.path}: the coefficients that it was merged with ({digest}) are not in the store",
            "name the file of them, which `mergecli merge --save-coefficients` writes",
        )
    raise InputError(
        f"{found.path}: has no learned coefficients",
        "methods such as `ada_merging` learn some: `mergecli methods`",
    )


def _opened(checkpoint: str | Path) -> Info:
    source = parse_source(str(checkpoint), Path())
    path = model_path(source)
    if source.task is not None:
        with open_source(source) as tower:
            return replace(_info(source, tower), files=0, size=tower.nbytes)
    if is_adapter(path):
        adapter = open_adapter(path)
        with adapter.stored as stored:
            return replace(_info(source, stored), kind="adapter", is_model=True, adapter=_about(adapter))
    with dequantized(read_through(open_checkpoint(path))) as whole:
        return _info(source, whole)


def _info(source: Source, whole: Checkpoint) -> Info:
    each = whole.vision()
    dtypes: dict[str, int] = {}
    for entry in each.entries.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.size
    return Info(
        path=str(source),
        kind=each.metadata.get("kind", "checkpoint"),
        parameters=sum(entry.size for entry in each.entries.values() if entry.is_float),
        whole_clip=whole.is_whole_clip,
        tensors={name: (entry.dtype, entry.shape) for name, entry in each.entries.items()},
        dtypes=dtypes,
        files=len(each.files),
        size=sum(file.stat().st_size for file in each.files),
        digest=each.digest(),
        metadata=each.metadata,
        is_model=is_model(each),
        coefficients=coefficients_of(each),
        mixture=_about_mixture(each) if each.is_mixture else {},
        quantized=about_quantization(each),
        warnings=tuple(found.text for found in findings_of(source, each)),
    )


def _about_mixture(stored: Checkpoint) -> dict[str, str]:
    """What a mixture is, a line for each property."""
    mixture = mixture_of(stored)
    return {
        "tasks": ", ".join(mixture.tasks),
        "routing": "routes" if mixture.is_routed else "needs the task",
        **({"heads": "learned, in place of zero-shot heads"} if mixture.has_heads else {}),
        "relative size": f"{stored.nbytes / mixture.shared.nbytes:.2f} of one tower",
    }


def _about(adapter: Adapter) -> dict[str, str]:
    """What an adapter's configuration says, a line for each property."""
    config = adapter.config
    ranks = [config.rank_of(module) for module in adapter.modules]
    scalings = [config.scaling(module) for module in adapter.modules]
    ends = sorted({module.rpartition(".")[2] for module in adapter.modules})
    about = {
        "adapter": adapter.stored.metadata.get("adapter", adapter.kind)
        + (" with rank-stabilized scaling" if config.use_rslora else ""),
        "rank": _span(ranks),
        "scaling": _span(scalings),
        "modules": f"{len(adapter.modules)} ({', '.join(ends)})",
    }
    if error := adapter.stored.metadata.get("error"):
        origin = "merged change" if "method" in adapter.stored.metadata else "change it was extracted from"
        about["error"] = f"{error} of the {origin}"
    if adapter.whole:
        about["whole tensors"] = str(len(adapter.whole))
    if config.base:
        about["trained on"] = config.base
    return about


def _span(values: Sequence[float]) -> str:
    """The value that all have, or the least and the largest."""
    return " to ".join(
        f"{each:g}" for each in dict.fromkeys((min(values, default=0), max(values, default=0)))
    )
