"""`extract`: a low-rank adapter out of a task vector or a fine-tuned model, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mergecli.formats.linear_layers import chosen_layers, expect_room
from mergecli.formats.lora_files import PLAIN, check_adapter_folder
from mergecli.formats.lora_writer import Factors, write_adapter
from mergecli.merging.low_rank import Change, dropped, factored, relative
from mergecli.merging.models import open_models
from mergecli.methods._base import Group, Unit
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import DTYPES, recipe_text
from mergecli.runtime.counts import count
from mergecli.runtime.errors import UsageError, did_you_mean
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.atomic import expect_finite, refuse_inputs, whole_folder
from mergecli.storage.metadata import about, inputs_of
from mergecli.storage.safetensors_format import DTYPE_BYTES

_NAME = "tuned"


@dataclass(frozen=True)
class Extracted:
    """An adapter that was extracted, and how far it is from what it was extracted from."""

    path: Path
    ranks: Mapping[str, int]
    """Module -> rank of its factors."""
    errors: Mapping[str, float]
    """Tensor -> |change - what is kept of it| / |change|, Frobenius norms; 1 where nothing is kept, 0 without change."""
    error: float
    """The same of all tensors together."""
    error_of_modules: float
    """The same of the adapter's modules alone."""
    dropped: tuple[str, ...]
    """Tensors that were changed and are not in the adapter: biases, norms, embeddings, and what was not chosen."""
    parameters: int
    size: int
    """Bytes of the adapter's weights."""
    tower_size: int
    """Bytes of the model that it changes."""


def extract(
    source: str | Path,
    *,
    output: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    modules: Sequence[str] = (),
    dtype: str = "float32",
    progress: AnyProgress | None = None,
) -> Extracted:
    """Writes the folder `output` with an adapter that plain peft loads: the truncated SVD of each weight's change.

    The best approximation of that rank (Eckart and Young 1936): B = U sqrt(S) and A = sqrt(S) V^T, so that W + B A; the
    configuration's alpha is its rank. One weight after the other; held in memory are those at work and the adapter.

    Args:
        source: a task vector; or a fine-tuned model, with `base`.
        rank: of every module's factors, at most the least side of the smallest of them.
        energy: instead of a rank, the share in (0, 1] of each change's squared norm that its rank has to keep.
        modules: names of linear layers or their ends, such as `q_proj`; by default all those of the encoder's layers.
        dtype: of the factors; the error counts what rounding them loses.

    Raises:
        UsageError: neither or both of `rank` and `energy`; no such module, or one smaller than the rank.
        InputError: a model is missing or damaged.
    """
    if (rank is None) == (energy is None):
        raise UsageError("expected either a rank or an energy", "`--rank 16`, or `--energy 0.9`")
    rank = rank if rank is None else count("rank", rank)
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy: expected a number in (0, 1], got {energy}")
    if dtype not in DTYPES[1:]:
        raise UsageError(
            f"dtype: expected one of {', '.join(DTYPES[1:])}, got `{dtype}`{did_you_mean(dtype, DTYPES)}"
        )
    target = Path(output)
    check_adapter_folder(target)
    recipe = recipe_of({_NAME: str(source)}, base=base)
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        models = open_models(recipe, stack, needs="deltas")
        refuse_inputs(target, models.paths)
        reference = models.reference
        chosen = chosen_layers(reference, modules)
        if rank is not None:
            expect_room(rank, reference, chosen)

        def work(_: int, group: Group) -> tuple[str, Change]:
            delta, keep = group.deltas[0], group.name in chosen
            return group.name, factored(delta, rank, energy, dtype) if keep else dropped(delta)

        changes: dict[str, Change] = {}
        for name, change in models.map(work, unit=Unit.TENSOR):
            changes[name] = change
            if report:
                report("extracting", len(changes), len(models.floats))
        found = {module: changes[name] for name, module in chosen.items()}
        # of a task vector the base is known, though it is not read
        origin = {key: each for key, each in inputs_of(models.tuned[_NAME].metadata).items() if key == "base"}
        error, error_of_modules = relative(changes.values()), relative(found.values())
        metadata = about(
            "adapter", recipe=recipe_text(recipe), inputs={**origin, **models.digests()}, error=f"{error:.6g}",
            error_of_modules=f"{error_of_modules:.6g}",
        )  # fmt: skip
        factors = {module: Factors(*change.factors) for module, change in found.items() if change.factors}
        tensors = {key: each for module, own in factors.items() for key, each in own.tensors(module).items()}
        expect_finite(
            tensors, target, "its training diverged, or the file is damaged: take an earlier checkpoint"
        )
        with whole_folder(target) as folder:
            write_adapter(folder, factors, reference, recipe.base, metadata)
        return Extracted(
            path=target,
            ranks={module: change.rank for module, change in found.items()},
            errors={name: relative([change]) for name, change in changes.items()},
            error=error,
            error_of_modules=error_of_modules,
            dropped=tuple(name for name, each in changes.items() if each.norm and not each.factors),
            parameters=sum(factor.numel() for factor in tensors.values()),
            size=(target / PLAIN).stat().st_size,
            tower_size=sum(each.size * DTYPE_BYTES[each.dtype] for each in reference.entries.values()),
        )
