"""Files besides the models that a method needs, named by its settings: opened, and known to fit the models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mergecli import methods
from mergecli.formats.mixture import mixture_of
from mergecli.formats.opening import open_source
from mergecli.formats.projection import CompletedCheckpoint
from mergecli.merging.learning.files import CURE, KIND, expect, finite, json_field
from mergecli.merging.models import Models, check_fit
from mergecli.methods._concrete_masks import logits_key, mask_shapes
from mergecli.methods._learned import Learner, Need
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.storage.checkpoint import PROJECTION, Checkpoint, open_checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.sources import parse_source
from mergecli.storage.store import locate

SETTINGS: Mapping[Need, str] = {"merged_tower": "merged", "masks": "masks"}
"""What a method needs -> its setting that names the file."""


TITLES: Mapping[Need, str] = {"merged_tower": "merged tower", "masks": "learnt masks"}
"""What a result calls the file among its inputs; no task has such a name."""


def open_needed(
    models: Models, method: Learner, recipe: Recipe, stack: ExitStack, *, learns: bool
) -> tuple[Learner, dict[Need, Checkpoint]]:
    """The method with settings that name files without their folders, so that no machine shows in a result; and the
    files, open until `stack` ends.

    Args:
        learns: whether the method has still to learn; masks are needed only then.

    Raises:
        UsageError: a file that must be named is not. InputError: a file is missing, damaged or does not fit the models.
    """
    found: dict[Need, Checkpoint] = {}
    if "merged_tower" in method.needs:
        name: str | None = getattr(method, SETTINGS["merged_tower"])
        if name is None:
            raise UsageError(
                "`method.merged`: no merged tower is named that the method could start from",
                "make one with another method, such as `mergecli merge RECIPE --method ada_merging -o ada.safetensors`; "
                "then name it with `--set method.merged=ada.safetensors`",
            )
        found["merged_tower"] = _merged_tower(name, models, recipe, stack)
    if learns and "masks" in method.needs and (name := getattr(method, SETTINGS["masks"])) is not None:
        found["masks"] = _masks(name, models, stack)
    labels = {SETTINGS[need]: getattr(method, SETTINGS[need]) for need in found}
    labels = {setting: parse_source(name, Path()).label for setting, name in labels.items()}
    return replace(method, **labels), found


def _merged_tower(name: str, models: Models, recipe: Recipe, stack: ExitStack) -> Checkpoint:
    merged = stack.enter_context(open_source(parse_source(name, Path()), recipe.base)).vision()
    if merged.is_mixture:
        raise InputError(
            f"{merged.path}: `method.merged`: expected one plain tower, got "
            + ("one that routes" if mixture_of(merged).is_routed else "towers of several tasks"),
            "name a merge by a method that writes one tower; a task's own tower in such a file is `PATH#TASK`",
        )
    if merged.is_task_vector:
        raise InputError(f"{merged.path}: is a task vector, a merged tower was expected as `method.merged`")
    base = models.base
    if base is not None and base.has_projection and not merged.has_projection:
        merged = CompletedCheckpoint.of(merged, base, base.entries[PROJECTION].shape)
    check_fit(replace(models, tuned={TITLES["merged_tower"]: merged}))
    return merged


def _masks(name: str, models: Models, stack: ExitStack) -> Checkpoint:
    stored = stack.enter_context(open_checkpoint(locate(parse_source(name, Path())), cure=CURE))
    path, learned_by = stored.path, stored.metadata.get("method", "")
    if stored.metadata.get("kind") != KIND or not _gives_masks(learned_by):
        able = [each for each in methods.names() if _gives_masks(each)]
        raise InputError(
            f"{path}: holds no masks",
            f"expected what {quoted(able)} learned, as `--save-coefficients` writes it",
        )
    stored.expect_checksums(CURE)
    if json_field(stored, "tasks") != list(models.tuned):
        raise InputError(f"{path}: holds masks for other models", f"these are {quoted(models.tuned)}")
    origin = inputs_of(stored.metadata)
    if other := [name for name, digest in models.digests().items() if origin.get(name) != digest]:
        raise InputError(f"{path}: its masks were learned on other weights of {quoted(other)}")
    expect(stored, mask_shapes(models.shapes))
    for tensor in models.floats:
        finite(stored, logits_key(tensor), stored.read(logits_key(tensor)))
    return stored


def _gives_masks(name: str) -> bool:
    method = methods.find(name) if name in methods.names() else None
    return method is not None and issubclass(method, Learner) and method.gives_masks
