"""`mergecli finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergecli.cli import options, show
from mergecli.errors import UsageError


def finetune(
    task: Annotated[
        str,
        typer.Option("--task", metavar="TASK", autocompletion=options.complete_tasks, help="What to learn."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .safetensors file, or a folder (no suffix).")
    ],
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Takes base and tasks from this recipe.")
    ] = None,
    base: options.Base = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Batches to learn from.")] = 4000,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Adam's step size at the start.")
    ] = 1e-5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a step.")] = 32,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="L2 penalty in Adam.")] = 0.0,
    schedule: Annotated[str, typer.Option("--schedule", help="cosine (to 0) or constant.")] = "cosine",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Order of the images.")] = 0,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between saved states.")] = 500,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the output: float32, float16 or bfloat16.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    changes: options.Set = None,
) -> None:
    """Fine-tune a vision tower on one task, with the zero-shot head fixed; prints its path.

    Interrupted, the same command goes on where it was.

    mergecli finetune --base toy:base --task digits --steps 200 --learning-rate 1e-4 -o digits.safetensors
    """
    if schedule not in ("cosine", "constant"):
        raise UsageError(f"--schedule: expected cosine or constant, got `{schedule}`")
    if recipe is None and base is None:
        raise UsageError("there is no base to start from", "name a recipe, or the base with `--base`")
    from mergecli import finetuning
    from mergecli.catalogue import read_recipe

    chosen: Any = schedule
    known = read_recipe(recipe, changes or []) if recipe else None
    with show.progress() as progress:
        done = finetuning.finetune(
            known, task=task, base=base, output=output, steps=steps, learning_rate=learning_rate,
            batch_size=batch_size, weight_decay=weight_decay, schedule=chosen, seed=seed, save_every=save_every,
            dtype=dtype, device=device, progress=progress,
        )  # fmt: skip
    show.line(str(done.path))
