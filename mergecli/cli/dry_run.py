"""`--dry-run` of every command that has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mergecli.cli import console, ending

if TYPE_CHECKING:
    from mergecli.results.plan import Plan


def show_plan(work: Callable[[], object], form: str | None = None) -> None:
    """Prints what the work would do: the plan on stdout, and its totals on stderr."""
    from mergecli.results.plan import plan

    found = plan(work)
    if form == "json":
        console.json(found.to_json())
    else:
        console.table(found.table, form)
    console.remark(_totals(found))


def _totals(found: Plan) -> str:
    again = f" in {found.passes} passes" if found.passes > 1 else ""
    parts = [f"read {ending.memory(found.reads)}{again}"] if found.reads else []
    parts += [f"write {ending.memory(found.writes)}"] if found.writes else []
    return (
        f"would {' and '.join(parts) or 'write nothing'}: about {ending.duration(found.seconds)}, "
        f"{ending.memory(found.memory)} of memory (estimates, measured for {ending.duration(found.measured)})"
    )
