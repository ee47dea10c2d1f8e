"""Arguments and options that several commands share, with the completion of their values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mergecli.runtime.engines.contract import ENGINES, Engine
from mergecli.runtime.errors import InputError, UsageError


def complete_methods(incomplete: str) -> list[str]:
    """Names of methods, for the shell."""
    from mergecli.methods import names

    return [name for name in names() if name.startswith(incomplete)]


def complete_tasks(incomplete: str) -> list[str]:
    """Names of tasks and sets of tasks, for the shell; after a comma, the next one."""
    from mergecli.data.tasks import names, sets

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in (*names(), *sets()) if name.startswith(last)]


def complete_formats(incomplete: str) -> list[str]:
    """Formats of tables, for the shell."""
    from mergecli.results.tables import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one key of the recipe; the value is TOML. Repeatable."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="FORMAT", autocompletion=complete_formats,
        help="table, tsv, csv, json, md, latex or html. Default: table on a terminal, tsv in a pipe.",
    ),
]  # fmt: skip
Base = Annotated[
    str | None, typer.Option("--base", metavar="SOURCE", help="The base model: hf:, ms:, toy: or a path.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check everything and show what would be done; write nothing.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images at a time.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Cache processed images and heads.")]
CacheSize = Annotated[
    str | None, typer.Option("--cache-size", metavar="SIZE", help="Largest size of the cache, such as 20GB.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="At most N images of each task, drawn evenly over the classes."),
]  # fmt: skip
Precision = Annotated[
    str,
    typer.Option("--precision", metavar="DTYPE", help="Of the forward pass: float32, bfloat16 or float16."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, help="Processes that decode images. Default: one a processor, at most 8."),
]  # fmt: skip
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw it: a .png, .svg or .pdf file.")]


def names(option: str, written: list[str] | None) -> tuple[str, ...]:
    """The names that an option was given, once or more, each time one or several with commas between them; none where it is
    not given.

    Raises:
        UsageError: it is given, and all of them are empty.
    """
    found = tuple(name.strip() for text in written or () for name in text.split(",") if name.strip())
    if written and not found:
        raise UsageError(f"{option}: is empty", "leave the option out for its default")
    return found


def is_recipe(arguments: list[str]) -> bool:
    """Whether the arguments are one recipe, and not models.

    Raises:
        InputError: there is one, a bare name that is neither, and so most likely meant as a recipe.
    """
    if len(arguments) != 1:
        return False
    path = Path(arguments[0])
    if not path.suffix and not set(arguments[0]) & set(":=#") and not os.path.exists(path):  # noqa: PTH110  a long name
        from mergecli.storage.store import nearest_path

        near = nearest_path(path)
        meant = f" (did you mean `{near}`?)" if near else ""
        raise InputError(f"{path}: no such file or recipe{meant}", "a recipe's name ends in `.toml`")
    return path.suffix == ".toml"


def _complete_engines(incomplete: str) -> list[str]:
    return [name for name in ENGINES if name.startswith(incomplete)]


def engine(
    engine: Annotated[
        str,
        typer.Option(
            "--engine", metavar="local|ray", autocompletion=_complete_engines,
            help="Where units of work run: local (processes of this machine) or ray (a cluster).",
        ),
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", metavar="N", min=1, help="Local processes. Default: 1, or one for each of --gpus."),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="GPUS", help="Local GPUs, a process each: all, or 0,1; implies --device cuda.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDRESS", help="The Ray cluster, HOST:PORT or auto. Default: RAY_ADDRESS, else Ray starts here."),
    ] = None,
    gpus_per_unit: Annotated[
        float | None,
        typer.Option("--gpus-per-unit", metavar="X", help="Of Ray: GPUs of a unit, such as 1 or 0.5. Default: 1 with --device cuda."),
    ] = None,
    cpus_per_unit: Annotated[
        int | None, typer.Option("--cpus-per-unit", metavar="N", min=1, help="Processors, and threads, of a unit.")
    ] = None,
    retries: Annotated[
        int, typer.Option("--retries", metavar="N", min=0, help="How often a unit is tried again whose worker was lost.")
    ] = 3,
    part: Annotated[
        str | None, typer.Option("--part", metavar="PART", help="Do part I of N of the units only, such as 1/3; see --collect.")
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Put together what all parts have done; says which units are missing.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on after a unit that fails, and tell at the end which have.")
    ] = False,
) -> Engine:  # fmt: skip
    """The engine that these options mean."""
    return Engine(
        engine, jobs, gpus, address, gpus_per_unit, cpus_per_unit, retries, part, collect, keep_going
    )


ENGINE_OPTIONS = tuple(inspect.signature(engine, eval_str=True).parameters.values())


def with_engine(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `engine` after its own, in place of its parameter `engine`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    every = [each for each in own if each.name != "engine"] + list(ENGINE_OPTIONS)

    def run(**given: Any) -> None:
        chosen = engine(**{each.name: given.pop(each.name) for each in ENGINE_OPTIONS})
        command(engine=chosen, **given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {each.name: each.annotation for each in every}
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    return run
