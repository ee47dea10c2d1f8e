"""`mergecli measure`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import amounts, console, ending, options
from mergecli.runtime.engines.contract import Engine


@options.with_engine
def measure(
    engine: Engine,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Names base, models and tasks.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder; valid files in it are not measured again.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", autocompletion=options.complete_methods,
            help="Replaces the recipe's [method]; one with calibration data.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--task", metavar="TASK", help="Which of the recipe's tasks; none: all. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    changes: options.Set = None,
) -> None:  # fmt: skip
    """Measure the statistics that a method needs of each model; prints one path a line.

    A merge needs only these files, not the images, so different processes or machines may measure different tasks.
    Processes of one `torchrun` share the tasks. After an interruption the same command measures what is missing.

    mergecli measure recipe.toml --method fisher -o stats/

    mergecli merge recipe.toml --method fisher --statistics stats/ -o fisher.safetensors
    """
    from mergecli.merging.learning.measure import measure
    from mergecli.runtime.distributed import is_first

    with console.progress() as progress:
        done = measure(
            recipe, output=output, method=method, only=options.names("--task", only), device=device,
            changes=changes or [], engine=engine, progress=progress,
        )  # fmt: skip
    if not is_first():
        return
    kept = len(done.paths) - len(done.new)
    ending.did(f"measured {amounts.count(len(done.new), 'file')}" + (f", kept {kept}" if kept else ""))
    ending.wrote(*(done.paths[name] for name in done.new))
    for path in done.paths.values():
        console.path(path)
