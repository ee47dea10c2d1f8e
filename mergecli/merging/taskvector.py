"""`taskvector`: a fine-tuned model minus its base, written as a file that says what it is: perhaps as codes of a few bits, or
moved to another base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.formats.opening import open_source
from mergecli.formats.projection import projection_metadata
from mergecli.formats.quantized import is_quantized, scheme_of, shared_path
from mergecli.formats.quantizer import BITS, PER
from mergecli.hub.fetched import expect_all
from mergecli.merging.merge_target import cast, foreign_vectors, same_weights
from mergecli.merging.models import Models, open_models
from mergecli.merging.quantize import Describe, Loss, Quantization, quantize_mixture
from mergecli.merging.rebase import Transport, write_moved
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import DTYPES, Recipe, recipe_text
from mergecli.runtime.counts import is_count
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, did_you_mean
from mergecli.runtime.notes import note
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.atomic import check_space, check_target, check_targets, refuse_inputs, warn_of_others
from mergecli.storage.checkpoint import TASK_VECTOR, Checkpoint
from mergecli.storage.metadata import UNKNOWN_DIGEST, about, inputs_of
from mergecli.storage.safetensors_format import DTYPE_BYTES, SAFETENSORS_NAMES
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.sources import named_sources, parse_source

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.methods._base import Group


def taskvector(
    tuned: str | Path | Recipe,
    *,
    output: str | Path,
    base: str | Path | None = None,
    dtype: str = "float32",
    quantize: int | None = None,
    per: str | None = None,
    residual: bool = False,
    rebase: Sequence[str | Path] | None = None,
    transport: str | None = None,
    examples: int | None = None,
    changes: Sequence[str] = (),
    progress: AnyProgress | None = None,
) -> tuple[Path, ...]:
    """The files with fine-tuned minus base: one at `output`, or one a task in the folder `output` for a recipe.

    Args:
        tuned: a fine-tuned model, with `base`; or a recipe or its `.toml` file, with a folder as `output`. To be quantized it
            may be a task vector too, or a mixture such as `emr` writes, whose parts for the tasks are quantized then; they need no
            base.
        dtype: of the differences; float32 keeps them exact, float16 and bfloat16 halve the file. Of quantized task vectors,
            that of the small tensors, which are not quantized.
        quantize: 8, 4, 3 or 2 bits an entry (TVQ). Such a file is read wherever a task vector is.
        per: what shares a step of the quantizer: a `row` of a tensor, or a whole `tensor` as in the paper.
        residual: of a recipe: quantize the mean of the task vectors, once and with a bit more (2: 3, 3: 4, 4: 8), and of
            each task vector what the quantized mean leaves (RTVQ). The mean is `shared/mean.safetensors` beside the files.
        rebase: two bases of one architecture, FROM and TO: the task vectors, which are FROM's, are moved to TO.
        transport: how: `orthogonal` by default, `identity`, `gradient_sign` or `gradient_force`; see `mergecli.merging.rebase`.
        examples: of the last two, the labeled training images of the task at which the gradient is taken; 128 by default.

    Raises:
        UsageError: an option is wrong. InputError: a model is missing or damaged, or a task vector already, or quantized.
    """
    if dtype not in DTYPES[1:]:
        raise UsageError(
            f"dtype: expected one of {', '.join(DTYPES[1:])}, got `{dtype}`{did_you_mean(dtype, DTYPES)}"
        )
    quantization = _quantization(quantize, per, residual, dtype)
    moving = _moving(rebase, transport, examples, base, quantization)
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
        check_targets([(path, ()) for path in (*targets.values(), *[shared_path(target)] * residual)], {})
    else:
        if residual:
            raise UsageError(
                "residual: is to the mean of several models, and there is one",
                "name a recipe, or leave it out",
            )
        if base is None and not quantization and not moving:
            raise UsageError("there is no base to subtract", "name it with `--base`")
        if target.suffix != ".safetensors":
            raise UsageError(f"{target}: expected the name of a `.safetensors` file")
        check_target(target)
        recipe = recipe_of(named_sources([str(tuned)]), base=base, changes=changes)
        targets = dict.fromkeys(recipe.tuned, target)
        if quantization and _is_quantized_mixture(recipe, quantization, target):
            return (target,)
    sources = dict(recipe.tuned)
    if moving:
        recipe = moving.recipe_of(recipe)
        sources[moving.label] = moving.goal
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        everything = replace(recipe, tuned=sources)
        needs = "deltas" if quantization else "base"
        models = open_models(everything, stack, needs=needs, besides=[moving.label] if moving else ())
        outputs = [*targets.values(), *([quantization.shared(targets)] if residual and quantization else [])]
        for path in outputs:
            refuse_inputs(path, models.paths)
        if not moving:
            _refuse_vectors(models, quantization)
        check_space(_sizes(models, targets, quantization, dtype))
        if target.suffix != ".safetensors":
            own = {path.relative_to(target).parts[0] for path in outputs}
            warn_of_others(target, own, models.paths.values())

        def describe(name: str, digests: Mapping[str, str]) -> dict[str, str]:
            return _metadata(models, replace(recipe, dtype=dtype), name, digests)

        if moving:
            for number, (name, path) in enumerate(targets.items()):
                if report:
                    report(f"moving {name}", number, len(targets))
                own = replace(models, tuned={key: models.tuned[key] for key in (name, moving.label)})
                _move(own, moving, moving.signs(recipe, name), dtype, path, describe)
        elif quantization:
            losses = quantization.write(models, targets, describe, report)
            note(_summary(quantization, losses, outputs, 4 * models.size * len(targets)))
        else:
            for number, (name, path) in enumerate(targets.items()):
                _subtract(replace(models, tuned={name: models.tuned[name]}), dtype, path, describe)
                if report:
                    report("subtracting", number + 1, len(targets))
    return tuple(targets.values())


def _quantization(bits: int | None, per: str | None, residual: bool, dtype: str) -> Quantization | None:
    """How the task vectors are quantized; None if they are not. Raises UsageError if that is not said rightly."""
    if bits is None:
        if residual or per is not None:
            option = "residual" if residual else "per"
            raise UsageError(
                f"{option}: is for quantized task vectors", "add `--quantize 4`, or leave it out"
            )
        return None
    if not is_count(bits) or bits not in BITS:
        raise UsageError(
            f"quantize: expected {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits, got {bits!r}"
        )
    if per is not None and per not in PER:
        raise UsageError(f"per: expected {' or '.join(PER)}, got `{per}`{did_you_mean(per, PER)}")
    return Quantization(bits, per or PER[0], residual, dtype)


def _moving(
    rebase: Sequence[str | Path] | None,
    transport: str | None,
    examples: int | None,
    base: str | Path | None,
    quantization: Quantization | None,
) -> Transport | None:
    """How the task vectors are moved to another base; None if they are not. Raises UsageError if that is not said rightly."""
    if rebase is None:
        if given := next(
            (key for key, each in (("transport", transport), ("examples", examples)) if each), None
        ):
            raise UsageError(
                f"{given}: is for task vectors that are moved", "add `--rebase FROM TO`, or leave it out"
            )
        return None
    if len(rebase) != 2:
        raise UsageError(f"rebase: expected two bases, FROM and TO, got {len(rebase)}")
    if base is not None:
        raise UsageError("base: `--rebase FROM TO` names both bases", "leave `--base` out")
    if quantization:
        raise UsageError(
            "quantize: a task vector is moved as it is",
            "move it first, then quantize what was written: `mergecli taskvector MOVED --quantize 4`",
        )
    start, goal = (parse_source(str(each), Path()) for each in rebase)
    return Transport.of(transport, start, goal, examples)


def _is_quantized_mixture(recipe: Recipe, quantization: Quantization, target: Path) -> bool:
    """Whether the one model is a mixture, whose task vectors it then quantizes."""
    (source,) = recipe.tuned.values()
    expect_all([recipe.base, source])
    with open_source(source, recipe.base) as opened:
        if not opened.is_mixture:
            return False
        if is_quantized(opened):
            raise _is_quantized_already(opened, source.label)
        refuse_inputs(target, {str(source): opened.files[0]})
        loss = quantize_mixture(opened, quantization, target)
        note(_summary(quantization, {source.label: loss}, [target], opened.nbytes))
        return True


def _is_quantized_already(opened: Checkpoint, name: str) -> InputError:
    return InputError(
        f"{opened.path}: `{name}` is quantized to {scheme_of(opened).bits} bits already",
        "a second rounding would add to the first: name what it was made of",
    )


def _refuse_vectors(models: Models, quantization: Quantization | None) -> None:
    """Raises InputError for a task vector that cannot be made into what is asked for."""
    for name, each in models.tuned.items():
        if each.is_task_vector and not quantization:
            raise InputError(f"{each.path}: `{name}` is a task vector already")
        if is_quantized(each):
            raise _is_quantized_already(each, name)


def _sizes(
    models: Models, targets: Mapping[str, Path], quantization: Quantization | None, dtype: str
) -> dict[Path, int]:
    if quantization:
        return quantization.sizes(models, targets)
    return dict.fromkeys(targets.values(), models.size * DTYPE_BYTES[SAFETENSORS_NAMES[dtype]])


def _move(
    models: Models,
    transport: Transport,
    signs: Mapping[str, Tensor],
    dtype: str,
    path: Path,
    describe: Describe,
) -> None:
    """Writes the task vector of the first of two models as one of the second."""
    name = next(iter(models.tuned))
    layout = {key: (SAFETENSORS_NAMES[dtype], shape) for key, shape in models.shapes.items()}

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        inputs = {"base": digests[transport.label], name: digests[name], "moved from": digests["base"]}
        return describe(name, {}) | {"inputs": json.dumps(inputs), "transport": transport.name}

    unknown = dict.fromkeys(("base", name, transport.label), UNKNOWN_DIGEST)
    with SafetensorsWriter(path, layout, metadata(unknown)) as writer:
        before, after = write_moved(
            models, transport, signs, lambda key, moved: writer.write(key, _fitting(moved, dtype, key))
        )
        digests = models.digests()
        writer.describe(metadata(digests))
    kept = f"{after / before:.1%}" if before else "all"
    note(f"{name}: {kept} of the task vector's norm is kept")
    for text in foreign_vectors(models, digests):
        warnings.warn(text, MergecliWarning, stacklevel=2)


def _metadata(models: Models, recipe: Recipe, name: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Of the file of a model's task vector, or with "" of what all of them share."""
    names = [name] if name else list(models.tuned)
    inputs = {key: digest for key, digest in digests.items() if key in ("base", *names)}
    more = {"task": name} if name else {}
    if name and models.tuned[name].is_task_vector:
        inputs.pop("base", None)
        if origin := inputs_of(models.tuned[name].metadata).get("base"):
            inputs = {"base": origin, **inputs}
    else:
        more |= projection_metadata(models.base)
    own = replace(recipe, tuned={each: recipe.tuned[each] for each in names})
    return about(TASK_VECTOR, recipe=recipe_text(own), inputs=inputs, **more)


def _summary(
    quantization: Quantization, losses: Mapping[str, Loss], outputs: Sequence[Path], whole: int
) -> str:
    """`4 bits an entry: the error is 8.1% (digits) to 9.3% (letters) of a task vector; 1,234 bytes in place of 9,876`."""
    ranked = sorted(losses, key=lambda name: losses[name].error)
    ends = dict.fromkeys((ranked[0], ranked[-1]))
    lost = " to ".join(f"{losses[name].error:.2%} ({name})" for name in ends)
    size = sum(path.stat().st_size for path in outputs)
    return (
        f"{quantization.bits} bits an entry: the error is {lost} of the task vector; "
        f"{size:,} bytes in place of {whole:,}"
    )


def _subtract(models: Models, dtype: str, path: Path, describe: Describe) -> None:
    (name,) = models.tuned
    layout = {key: (SAFETENSORS_NAMES[dtype], shape) for key, shape in models.shapes.items()}
    unknown = dict.fromkeys(("base", name), UNKNOWN_DIGEST)
    with SafetensorsWriter(path, layout, describe(name, unknown)) as writer:

        def write(start: int, group: Group) -> None:
            writer.write(group.name, _fitting(group.deltas[0], dtype, group.name), start)

        for _ in models.map(write):
            pass
        digests = models.digests()
        writer.describe(describe(name, digests))
    for text in same_weights(models.tuned, digests):
        warnings.warn(text, MergecliWarning, stacklevel=2)


def _fitting(difference: Tensor, dtype: str, name: str) -> Tensor:
    """The entries of a task vector in a dtype; raises InputError where one does not fit."""
    return cast(
        difference, SAFETENSORS_NAMES[dtype], name, "differences", "use `--dtype float32` or `bfloat16`"
    )
