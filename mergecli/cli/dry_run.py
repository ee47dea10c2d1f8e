"""`--dry-run` of every command that has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mergecli.cli import amounts, console, ending
from mergecli.runtime.distributed import is_first

if TYPE_CHECKING:
    from mergecli.results.plan import Plan, Work
    from mergecli.results.tables import Table


def show_plan(work: Callable[[], object], form: str | None = None) -> None:
    """Prints what the work would do: the plan on stdout, and its totals on stderr."""
    from mergecli.results.plan import plan

    found = plan(work)
    if not is_first():
        return
    if form == "json":
        console.json(found.to_json())
    else:
        console.table(found.table, form, [_drawn(found)])
    ending.did(_totals(found))


def _drawn(found: Plan) -> Table:
    """The plan for a terminal, on which all its columns have no place."""
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table
    from mergecli.storage.store import home

    def what(each: Work) -> str:
        if each.file is None:
            return each.what
        if each.file.startswith(f"{home()}/"):
            return f"{each.what} (store)"
        return each.file if each.work == "write" else f"{each.what}: {each.file}"

    rows = tuple(
        (each.work, what(each), _amounts(each), "" if each.seconds is None else f"{each.seconds:.1f}")
        for each in found.work
    )
    return Table((Column("work"), Column("what"), Column("amount"), Column("seconds", "mixed")), rows)


def _amounts(each: Work) -> str:
    parts = [
        amounts.count(each.images, "image") if each.images is not None else "",
        amounts.count(each.steps, "step") if each.steps is not None else "",
        amounts.count(each.tensors, "tensor") if each.tensors is not None else "",
        amounts.memory(each.bytes) if each.bytes is not None else "",
        amounts.count(each.passes, "time") if each.work == "read" and each.passes and each.passes > 1 else "",
        "from the cache" if each.cached else "",
    ]
    return ", ".join(filter(None, parts))


def _totals(found: Plan) -> str:
    again = f" in {found.passes} passes" if found.passes > 1 else ""
    parts = [f"read {amounts.memory(found.reads)}{again}"] if found.reads else []
    parts += [f"write {amounts.memory(found.writes)}"] if found.writes else []
    return (
        f"would {' and '.join(parts) or 'write nothing'}: about {amounts.duration(found.seconds)}, "
        f"{amounts.memory(found.memory)} of memory (estimates, measured for {amounts.duration(found.measured)})"
    )
