"""`export`: a vision tower as a whole CLIP under the names of another library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.formats.lora_files import is_adapter
from mergecli.formats.mixture import one_tower
from mergecli.formats.open_clip_names import Part, open_clip_parts
from mergecli.formats.opening import model_path, open_source
from mergecli.formats.projection import own_encoder
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError, UsageError, did_you_mean, listed
from mergecli.runtime.progress import AnyProgress, Progress, shown
from mergecli.storage.atomic import check_space, check_targets, refuse_inputs, whole_file
from mergecli.storage.checkpoint import VISION, Checkpoint
from mergecli.storage.differences import Form, differences, other_architecture
from mergecli.storage.metadata import about
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES, TORCH_NAMES, layout_size
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.sources import Source, parse_source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = ("open_clip",)
_SUFFIXES = (".pt", ".safetensors")
_ARCHITECTURES = {
    (768, 12, 32, 50): "ViT-B-32",
    (768, 12, 32, 65): "ViT-B-32-256",
    (768, 12, 16, 197): "ViT-B-16",
    (1024, 24, 14, 257): "ViT-L-14",
    (1024, 24, 14, 577): "ViT-L-14-336",
    (1280, 32, 14, 257): "ViT-H-14",
    (1408, 40, 14, 257): "ViT-g-14",
    (1664, 48, 14, 257): "ViT-bigG-14",
}
"""Width, layers, pixels of a patch's side and positions -> what open_clip calls the model."""


@dataclass(frozen=True)
class Exported:
    """A file that was exported."""

    path: Path
    tensors: int
    parameters: int
    model: str | None
    """What open_clip's `create_model` calls its architecture; None where that is not known."""
    inputs: Mapping[str, str]
    """`tower`, and `clip` where there is one besides -> digest of its vision tower, or of the whole."""


def export(
    source: str | Path,
    *,
    output: str | Path,
    to: str = "open_clip",
    clip: str | Path | None = None,
    progress: AnyProgress | None = None,
) -> Exported:
    """Writes a whole CLIP for open_clip's `create_model`, as it lies in files of open_clip and OpenAI: their names, queries,
    keys and values in one tensor, projections transposed. Values and dtypes stay what they are.

    Args:
        source: a vision tower, a whole CLIP, `FILE#TASK` of a mixture, or an adapter, whose base `clip` is then.
        output: a `.pt` file, which is `torch.save` of the state dict, or a `.safetensors` file. A `.pt` file is made in
            memory, the other tensor by tensor.
        to: `open_clip`.
        clip: the CLIP that gives the text tower, the projections and the logit scale; by default the source is one. A source
            with a visual projection of its own keeps that.

    Raises:
        UsageError: an argument is wrong. InputError: a model is missing, damaged, or not a CLIP of OpenAI's architecture.
    """
    if to not in FORMATS:
        raise UsageError(f"--to: expected {' or '.join(FORMATS)}, got `{to}`{did_you_mean(to, FORMATS)}")
    target = Path(output)
    check_targets([(target, _SUFFIXES)], {})
    given = parse_source(str(source), Path())
    rest = parse_source(str(clip), Path()) if clip is not None else None
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        if rest is None and is_adapter(model_path(given)):
            raise UsageError(
                f"{given}: is an adapter, and there is no CLIP to add it to", "name its base with `--clip`"
            )
        opened = stack.enter_context(open_source(given, rest))
        whole = stack.enter_context(open_source(rest)) if rest else opened
        one_tower(opened)
        _expect_clip(whole, given if rest is None else rest, is_source=rest is None)
        tower = own_encoder(opened, whole)
        _expect_tower(tower, given)
        for each in (opened, whole):
            refuse_inputs(target, {file.name: file for file in each.files})
        if rest is not None:
            _expect_fit(tower, whole.encoder() if tower.has_projection else whole.vision(), given)
        read = {name: whole for name in whole.entries if not name.startswith(VISION)}
        read |= dict.fromkeys(tower.entries, tower)
        parts = open_clip_parts(tower.path, read)
        layout = {name: _form(each, read) for name, each in parts.items()}
        check_space({target: layout_size(layout)})
        inputs = {"tower": tower.digest()} | ({"clip": whole.digest()} if rest is not None else {})
        if target.suffix == ".pt":
            _save(target, parts, read, report)
        else:
            carried = {key: tower.metadata[key] for key in ("method", "recipe") if key in tower.metadata}
            metadata = about("checkpoint", inputs=inputs, exported_to=to, **carried)
            with SafetensorsWriter(target, layout, metadata) as writer:
                for number, name in enumerate(parts):
                    interrupts.check()
                    writer.write(name, _tensor(parts[name], read))
                    if report:
                        report("exporting", number + 1, len(parts))
        sizes = [each.entries[name].size for name, each in read.items()]
        return Exported(target, len(parts), sum(sizes), _architecture(tower, rest or given), inputs)


def _save(
    target: Path, parts: Mapping[str, Sequence[Part]], read: Mapping[str, Checkpoint], report: Progress | None
) -> None:
    """Writes a state dict as `torch.save` does."""
    import torch

    state: dict[str, Tensor] = {}
    for number, (name, each) in enumerate(parts.items()):
        interrupts.check()
        state[name] = _tensor(each, read)
        if report:
            report("exporting", number + 1, len(parts))
    with whole_file(target) as file:
        torch.save(state, file)


def _expect_tower(tower: Checkpoint, source: Source) -> None:
    if tower.is_task_vector:
        raise InputError(f"{source}: is a task vector, and no model", "merge it into its base first")
    if f"{VISION}embeddings.class_embedding" not in tower.entries:
        raise InputError(
            f"{source}: has no vision tower of a CLIP",
            "only OpenAI's architecture, such as ViT-B-32, can be exported",
        )


def _expect_clip(whole: Checkpoint, source: Source, *, is_source: bool) -> None:
    if whole.is_whole_clip:
        return
    what = "has a vision tower alone" if is_source else "is no whole CLIP"
    raise InputError(
        f"{source}: {what}, and the text tower, the projections and the logit scale have to come from one",
        "name the CLIP that it was fine-tuned from with `--clip`",
    )


def _expect_fit(tower: Checkpoint, own: Checkpoint, source: Source) -> None:
    wanted = {name: Form(entry.shape, entry.dtype, entry.is_float) for name, entry in own.entries.items()}
    lines = differences(tower.entries, wanted, "the CLIP has")
    if other := other_architecture(tower.entries, wanted, "the CLIP has"):
        raise InputError(
            f"{source}: is of another architecture than the CLIP: {other}", details=listed(lines, len(lines))
        )
    if lines:
        raise InputError(f"{source}: does not fit the CLIP:\n{listed(lines, 10)}")


def _form(parts: Sequence[Part], read: Mapping[str, Checkpoint]) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of the tensor that is made of these."""
    import torch

    entries = [read[part.name].entries[part.name] for part in parts]
    kinds: list[torch.dtype] = [getattr(torch, TORCH_NAMES[entry.dtype]) for entry in entries]
    dtype = SAFETENSORS_NAMES[str(reduce(torch.promote_types, kinds)).removeprefix("torch.")]
    shape = entries[0].shape[::-1] if parts[0].origin.transposed else entries[0].shape
    return dtype, (shape[0] * len(parts), *shape[1:]) if len(parts) > 1 else shape


def _tensor(parts: Sequence[Part], read: Mapping[str, Checkpoint]) -> Tensor:
    import torch

    tensors = [read[part.name].read(part.name) for part in parts]
    if len(tensors) > 1:
        return torch.cat(tensors)
    return tensors[0].t().contiguous() if parts[0].origin.transposed else tensors[0]


def _architecture(tower: Checkpoint, source: Source) -> str | None:
    """What open_clip calls the model. The weights tell its size, and only its configuration whether it has OpenAI's activation."""
    shapes = {name.removeprefix(f"{VISION}embeddings."): entry.shape for name, entry in tower.entries.items()}
    width, _, side, _ = shapes["patch_embedding.weight"]
    layers = sum(name.endswith("layer_norm1.weight") for name in shapes)
    known = _ARCHITECTURES.get((width, layers, side, shapes["position_embedding.weight"][0]))
    path = model_path(source)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if known is None or not file.is_file():
        return None
    try:
        config: Any = json.loads(file.read_text("utf-8"))
        activation = config.get("vision_config", config).get("hidden_act", "quick_gelu")
    except (ValueError, AttributeError, RecursionError):
        return None
    return f"{known}-quickgelu" if activation == "quick_gelu" else known
