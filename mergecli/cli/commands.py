"""The commands."""

from __future__ import annotations

COMMANDS = {
    "fetch": "mergecli.cli.fetch",
    "taskvector": "mergecli.cli.taskvector",
    "merge": "mergecli.cli.merge",
    "eval": "mergecli.cli.evaluate",
    "search": "mergecli.cli.search",
    "continual": "mergecli.cli.continual",
    "measure": "mergecli.cli.measure",
    "cos-sim": "mergecli.cli.cos_sim",
    "report": "mergecli.cli.report",
    "push": "mergecli.cli.push",
    "finetune": "mergecli.cli.finetune",
    "extract": "mergecli.cli.extract",
    "export": "mergecli.cli.export",
    "info": "mergecli.cli.info",
    "cache": "mergecli.cli.cache",
    "methods": "mergecli.cli.methods",
    "tasks": "mergecli.cli.tasks",
    "doctor": "mergecli.cli.doctor",
}
"""Command -> its module, in the order of `--help`. The function in it has the module's name."""

SHARED = ("merge", "measure", "finetune")
"""Those whose work the processes of `torchrun` share; the first process does the others' work alone."""
