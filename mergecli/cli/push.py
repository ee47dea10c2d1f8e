"""`mergecli push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import console, ending

if TYPE_CHECKING:
    from mergecli.hub.push import Pushed


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder, as `mergecli merge -o FOLDER` writes.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="hf:org/name or ms:org/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The branch; default: the hub's own, main or master.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be pushed; write nothing.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Files at a time.")] = 4,
    token_to_endpoint: Annotated[
        bool,
        typer.Option("--token-to-endpoint", help="Send the token to an HF_ENDPOINT that is not the hub itself, too."),
    ] = False,
) -> None:  # fmt: skip
    """Bring a model to Hugging Face or ModelScope; prints its address. It and fetch alone reach the internet.

    The repository gets one commit with what differs. Ctrl-C loses nothing that has arrived: the same command resumes.

    mergecli push out/ties hf:org/ties --private
    """
    from mergecli.hub.push import push

    with console.progress() as progress:
        done = push(
            folder, target, private=private, revision=revision, dry_run=dry_run, jobs=jobs,
            token_to_endpoint=token_to_endpoint, progress=progress, note=console.note,
        )  # fmt: skip
    if dry_run:
        _show_plan(done)
        return
    ending.did(f"pushed {_sum(done)}" if _changed(done) else "nothing differs: nothing was pushed")
    console.line(done.url)


def _show_plan(done: Pushed) -> None:
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    columns = (Column("file"), Column("bytes", "count"), Column("state"))
    console.table(Table(columns, tuple((each.path, each.size, each.state) for each in done.files)), None)
    visibility = f"{'private' if done.private else 'public'} " if done.creates == "repository" else ""
    new = f"a new {visibility}{done.creates}, " if done.creates else ""
    would = f"would push {_sum(done)}, to {new}{done.url}"
    ending.did(would if _changed(done) else f"nothing differs from {done.url}")


def _changed(done: Pushed) -> bool:
    return bool(done.creates) or any(each.state != "same" for each in done.files)


def _sum(done: Pushed) -> str:
    sent = [each for each in done.files if each.state in ("new", "changed")]
    removed = sum(each.state == "removed" for each in done.files)
    text = f"{len(sent)} file{'' if len(sent) == 1 else 's'}, {sum(each.size for each in sent):,} bytes"
    return text + (f", and removed {removed}" if removed else "")
