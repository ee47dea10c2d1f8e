"""`mergecli finetune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import amounts, console, ending, options
from mergecli.cli.dry_run import show_plan
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergecli.training.finetune import Finetuned


@options.with_engine
def finetune(
    engine: Engine,
    task: Annotated[
        list[str],
        typer.Option(
            "--task", metavar="TASK", autocompletion=options.complete_tasks,
            help="Task to train on. Repeatable: several at once, their losses summed.", show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .safetensors file, or a folder (no suffix); for adapters a folder.")
    ],
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Takes base and tasks from this recipe.")
    ] = None,
    base: options.Base = None,
    changes: options.Set = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of the weights.")] = 4000,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Adam's step size, after the warm-up.")] = 1e-5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a task in a batch.")] = 32,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches that make a step.")] = 1,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="L2 penalty in Adam.")] = 0.0,
    schedule: Annotated[str, typer.Option("--schedule", help="cosine (to 0) or constant.")] = "cosine",
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, metavar="STEPS", help="Steps over which the learning rate rises from near 0.")
    ] = 0,
    epsilon: Annotated[
        float, typer.Option("--epsilon", help="Adam's: weights with smaller gradients move less than the learning rate.")
    ] = 1e-8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the shuffling, and of an adapter's start and dropout.")] = 0,
    precision: Annotated[
        str, typer.Option("--precision", help="Of the forward pass: float32, bfloat16, or on a GPU float16.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    lora: Annotated[bool, typer.Option("--lora", help="Train a low-rank adapter instead of the tower.")] = False,
    l_lora: Annotated[bool, typer.Option("--l-lora", help="Train a linearized one: its A is frozen.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of an adapter; default 16.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="It is scaled by alpha / rank; default 32.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option("--target-modules", metavar="NAMES", help="Its linear layers; default q_proj,v_proj."),
    ] = None,
    lora_dropout: Annotated[float | None, typer.Option("--lora-dropout", help="Of its inputs; default 0.1.")] = None,
    validate_every: Annotated[
        int, typer.Option("--validate-every", min=0, metavar="STEPS", help="Validate every so many steps; write the best weights.")
    ] = 0,
    validation_split: Annotated[
        str | None,
        typer.Option("--validation-split", metavar="SPLIT", help="Default: validation, or a tenth held out of train."),
    ] = None,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between saved resume files.")] = 500,
    each: Annotated[
        bool, typer.Option("--each", help="Train a model for each task, DIR/TASK.safetensors, in place of one for all.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming an interrupted training.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the output: float32, float16 or bfloat16.")] = "float32",
    dry_run: options.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written, or the plan, as JSON.")] = False,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write losses and accuracies of each step (.csv).")] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write them for TensorBoard.")
    ] = None,
) -> None:  # fmt: skip
    """Fine-tune a vision tower, or an adapter for it, with the zero-shot heads fixed; prints its path.

    The same command resumes an interrupted training. `torchrun -m mergecli finetune ...` trains on several devices.

    mergecli finetune --base toy:base --task digits --steps 200 --learning-rate 1e-4 -o digits.safetensors

    mergecli finetune --base toy:base --task digits --task letters --lora --validate-every 100 -o adapter

    mergecli finetune recipe.toml --task ta8 --each -o experts/ --gpus all
    """
    if schedule not in ("cosine", "constant"):
        raise UsageError(f"--schedule: expected cosine or constant, got `{schedule}`")
    if recipe is None and base is None:
        raise UsageError("there is no base to start from", "name a recipe, or the base with `--base`")
    from dataclasses import asdict

    from mergecli.recipe.reading import recipe_of
    from mergecli.runtime.distributed import is_first
    from mergecli.training.each import finetune_each
    from mergecli.training.finetune import finetune

    known = recipe_of(recipe, changes=changes or []) if recipe else None
    if not each and engine != Engine():
        raise UsageError("a single training is one unit of work", "`--each` trains a model for each task")
    if each and (option := "--trace" if trace else "--tensorboard" if tensorboard else None):
        raise UsageError(f"{option}: is for a single training, and does not go with --each")
    verb = (
        partial(finetune_each, engine=engine)
        if each
        else partial(finetune, trace=trace, tensorboard=tensorboard)
    )
    with console.progress() as progress:
        work = partial(
            verb, known, task=options.names("--task", task), base=base, output=output, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
            weight_decay=weight_decay, schedule=schedule, warmup=warmup, epsilon=epsilon, accumulate=accumulate, precision=precision, seed=seed,
            lora=lora, l_lora=l_lora, rank=rank, alpha=alpha, target_modules=target_modules, lora_dropout=lora_dropout,
            validate_every=validate_every, validation_split=validation_split,
            device=device, dtype=dtype, save_every=save_every, fresh=fresh, progress=progress,
        )  # fmt: skip
        if dry_run:
            show_plan(work, "json" if as_json else None)
            return
        done = work()
    if isinstance(done, tuple):
        _tell_each(done, as_json)
        return
    if is_first():
        ending.did(f"trained {amounts.count(done.steps - done.resumed_from, 'step')}{_best(done)}")
        ending.wrote(done.path)
        ending.wrote_beside(trace, tensorboard)
        if as_json:
            console.json({**asdict(done), "path": str(done.path)})
        else:
            console.path(done.path)


def _tell_each(done: Sequence[Finetuned], as_json: bool) -> None:
    from dataclasses import asdict

    ending.did(f"trained {amounts.count(len(done), 'model')}")
    ending.wrote(*(each.path for each in done))
    if as_json:
        console.json([{**asdict(each), "path": str(each.path)} for each in done])
        return
    for each in done:
        console.path(each.path)


def _best(done: Finetuned) -> str:
    """Which step won, if there were validations."""
    if done.best_step not in done.validation:
        return ""
    accuracies = done.validation[done.best_step].values()
    return f", of which step {done.best_step} validated best ({sum(accuracies) / len(accuracies):.1%}) and is written"
