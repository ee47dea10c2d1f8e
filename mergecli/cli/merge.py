"""`mergecli merge`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import console, ending, options
from mergecli.cli.dry_run import show_plan
from mergecli.runtime.errors import UsageError


def merge(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .safetensors file, or a folder (no suffix) for transformers.")
    ],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE|[NAME=]SOURCE...", help="A recipe, or models.")
    ] = None,
    base: options.Base = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", autocompletion=options.complete_methods,
            help="Replaces the recipe's [method]; `mergecli methods` lists them.",
        ),
    ] = None,
    changes: options.Set = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Of the output: same, float32, float16 or bfloat16.")
    ] = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write an adapter that plain peft loads: a folder.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", help="Of the adapter, at most. Default: as much as the merge has.")
    ] = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto", metavar="MERGE|BASE",
            help="Go on from an earlier merge without its models; from the base, begin. Writes NEXT.state.safetensors too.",
        ),
    ] = None,
    replace: Annotated[
        str | None,
        typer.Option("--replace", metavar="TASK[=SOURCE]", help="With --onto: put the new model of a task in the place of the old one."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="TASK[=SOURCE]", help="With --onto: take a task's model out. Repeatable."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the method computes: cpu, cuda, cuda:1, ...")] = "cpu",
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="Split a folder's weights, such as 2GB.")
    ] = None,
    card: Annotated[
        bool | None,
        typer.Option("--card/--no-card", help="Write a model card, README.md. Default: for a folder, not for a file."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="KEY=VALUES",
            help="A checkpoint for each value: method.density=0.1,0.2 or method.scaling_factor=0.1:1.0:0.1. Repeatable.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", metavar="DIR", help="Of methods with calibration data: folder of statistics, one file per task."),
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option("--coefficients", help="Apply what a method has learned before; needs no images.")
    ] = None,
    save_coefficients: Annotated[
        Path | None, typer.Option("--save-coefficients", help="Write what the method learns (.safetensors).")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a row for each step of learning (.csv).")] = None,
    plot: options.Plot = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write the same for TensorBoard.")
    ] = None,
    dry_run: options.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written and its digests, or the plan, as JSON.")] = False,
) -> None:  # fmt: skip
    """Merge fine-tuned models into one checkpoint; prints its path.

    mergecli merge recipe.toml --method ties --set method.density=0.1 -o out/ties.safetensors

    mergecli merge --base toy:base toy:digits toy:letters --method task_arithmetic -o merged.safetensors

    mergecli merge --base toy:base lora/digits lora/letters --method ties --as-adapter -o lora/merged

    mergecli merge recipe.toml --method ties --sweep method.scaling_factor=0.1:0.5:0.1 -o swept/

    mergecli merge --onto two.safetensors shapes.safetensors --method opcm -o three.safetensors
    """
    from mergecli.merging.merge import merge
    from mergecli.runtime.distributed import is_first
    from mergecli.storage.sources import named_sources

    if not models and not without:
        raise UsageError("there are no fine-tuned models to merge", "name a recipe, or models as arguments")
    if options.is_recipe(models or []):
        if base is not None:
            raise UsageError("--base: a recipe names its base itself", "use `--set base=...` to change it")
        what: Path | dict[str, str] = Path((models or [""])[0])
    else:
        if (
            method is None
            and onto is None
            and not any(change.startswith("method.name") for change in [*(changes or []), *(sweep or [])])
        ):
            raise UsageError(
                "no method is named", "name one with `--method NAME`; `mergecli methods` lists them"
            )
        what = named_sources(models or [])
    with console.progress() as progress:
        if sweep:
            from mergecli.merging.sweep_points import merge_sweep, points_of

            if shard_size is not None:
                raise UsageError("--shard-size: a sweep writes single files")
            if save_coefficients or trace or plot or tensorboard:
                raise UsageError("a sweep has no single file of coefficients to save, trace or plot")
            if as_adapter or rank is not None:
                option = "--as-adapter" if as_adapter else "--rank"
                raise UsageError(
                    f"{option}: a sweep writes whole weights", "merge the best point again with it"
                )
            if onto is not None or replace is not None or without:
                raise UsageError("--onto: a sweep begins anew, and does not go on from a merge")
            if card:
                raise UsageError("--card: a sweep writes several models, and a folder has one card")
            changed = [*(changes or []), *([] if dtype is None else [f'dtype="{dtype}"'])]
            points = points_of(what, sweep, base=base, method=method, changes=changed)
            work = partial(
                merge_sweep, points, output, device=device, statistics=statistics, coefficients=coefficients,
                progress=progress,
            )  # fmt: skip
        else:
            work = partial(
                merge, what, output=output, base=base, method=method, changes=changes or [], dtype=dtype, as_adapter=as_adapter,
                rank=rank, onto=onto, replace=replace, without=without or (), device=device, shard_size=shard_size, card=card,
                statistics=statistics, coefficients=coefficients,
                save_coefficients=save_coefficients, trace=trace, plot=plot, tensorboard=tensorboard, progress=progress,
            )  # fmt: skip
        if dry_run:
            show_plan(work, "json" if as_json else None)
            return
        done = work()
    written = done if isinstance(done, tuple) else (done,)
    for text in dict.fromkeys(text for each in written for text in each.warnings):
        console.warning(text)
    if not is_first():
        return
    for each in written:
        if each.error is not None:
            console.note(
                f"the adapter has rank {each.rank}; its distance to the merge is {each.error:.2%} of the merged change"
            )
        ending.wrote(each.path, digest=each.digest)
        ending.wrote_beside(each.state, each.card if each.path.suffix else None)
    ending.wrote_beside(save_coefficients, trace, plot, tensorboard)
    described = [
        {"path": str(each.path), "method": each.method, "tasks": each.tasks, "tensors": each.tensors,
         "parameters": each.parameters, "digest": each.digest, "inputs": each.inputs,
         **({"rank": each.rank, "error": each.error} if each.error is not None else {}),
         **({"state": str(each.state)} if each.state else {})}
        for each in written
    ]  # fmt: skip
    if as_json:
        console.json(described if sweep else described[0])
        return
    for each in written:
        console.path(each.path)
