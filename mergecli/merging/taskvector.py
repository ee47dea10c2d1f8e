"""`taskvector`: a fine-tuned model minus its base, written as a file that says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mergecli.merging.models import Models, open_models
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import DTYPES, Recipe, recipe_text
from mergecli.runtime.errors import InputError, UsageError, did_you_mean
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.atomic import check_space, check_target, check_targets, refuse_inputs, warn_of_others
from mergecli.storage.checkpoint import TASK_VECTOR
from mergecli.storage.metadata import UNKNOWN_DIGEST, about
from mergecli.storage.safetensors_format import DTYPE_BYTES, SAFETENSORS_NAMES
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.sources import named_sources


def taskvector(
    tuned: str | Path | Recipe,
    *,
    output: str | Path,
    base: str | Path | None = None,
    dtype: str = "float32",
    changes: Sequence[str] = (),
    progress: AnyProgress | None = None,
) -> tuple[Path, ...]:
    """The files with fine-tuned minus base: one at `output`, or one a task in the folder `output` for a recipe.

    Args:
        tuned: a fine-tuned model, with `base`; or a recipe or its `.toml` file, with a folder as `output`.
        dtype: of the differences; float32 keeps them exact, float16 and bfloat16 halve the file.
    """
    if dtype not in DTYPES[1:]:
        raise UsageError(
            f"dtype: expected one of {', '.join(DTYPES[1:])}, got `{dtype}`{did_you_mean(dtype, DTYPES)}"
        )
    target = Path(output)
    if isinstance(tuned, Recipe) or Path(tuned).suffix == ".toml":
        recipe = recipe_of(tuned, base=base, changes=changes)
        if target.suffix == ".safetensors":
            raise UsageError(
                f"{target}: a recipe has several models, so the output is a folder",
                f"write `-o {target.with_suffix('')}/`",
            )
        check_target(target, folder=True)
        targets = {name: target / f"{name}.safetensors" for name in recipe.tuned}
        check_targets([(path, ()) for path in targets.values()], {})
    else:
        if base is None:
            raise UsageError("there is no base to subtract", "name it with `--base`")
        if target.suffix != ".safetensors":
            raise UsageError(f"{target}: expected the name of a `.safetensors` file")
        check_target(target)
        recipe = recipe_of(named_sources([str(tuned)]), base=base, changes=changes)
        targets = dict.fromkeys(recipe.tuned, target)
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        models = open_models(recipe, stack, needs="base")
        for name, each in models.tuned.items():
            if each.is_task_vector:
                raise InputError(f"{each.path}: `{name}` is a task vector already")
            refuse_inputs(targets[name], models.paths)
        assert models.base is not None
        count = sum(models.base.entries[key].size for key in models.floats)
        check_space(dict.fromkeys(targets.values(), count * DTYPE_BYTES[SAFETENSORS_NAMES[dtype]]))
        if target.suffix != ".safetensors":
            warn_of_others(target, {path.name for path in targets.values()}, models.paths.values())
        for number, (name, path) in enumerate(targets.items()):
            one = replace(recipe, tuned={name: recipe.tuned[name]}, dtype=dtype)
            _subtract(Models(models.base, {name: models.tuned[name]}), one, path)
            if report:
                report("subtracting", number + 1, len(targets))
    return tuple(targets.values())


def _subtract(models: Models, recipe: Recipe, path: Path) -> None:
    import torch

    assert models.base is not None
    (name,) = models.tuned
    dtype = SAFETENSORS_NAMES[recipe.dtype]
    layout = {key: (dtype, models.base.entries[key].shape) for key in models.floats}

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        return about(TASK_VECTOR, recipe=recipe_text(recipe), inputs=digests, task=name)

    with SafetensorsWriter(path, layout, metadata(dict.fromkeys(("base", name), UNKNOWN_DIGEST))) as writer:
        kind = getattr(torch, recipe.dtype)
        for _ in models.map(lambda start, group: writer.write(group.name, group.deltas[0].to(kind), start)):
            pass
        writer.describe(metadata(models.digests()))
