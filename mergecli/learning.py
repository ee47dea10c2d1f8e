"""What methods that look at images learn before a merge, and the files that it comes from and goes to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergecli.checkpoint import Checkpoint
from mergecli.errors import UsageError
from mergecli.merge_output import Output
from mergecli.methods import name_of
from mergecli.methods._adapted import Adapted
from mergecli.methods._calibrated import Calibrated
from mergecli.methods.representation_surgery import RepresentationSurgery
from mergecli.models import Models
from mergecli.output import check_target, check_targets, refuse_inputs
from mergecli.progress import Progress


@dataclass(frozen=True)
class Lesson:
    """What one output's method has learnt."""

    output: Output
    """With the settings that it was learnt with."""
    learnt: Any = None
    """What `merge` gets; None for methods that look at weights only."""
    files: Mapping[str, Checkpoint] = field(default_factory=dict[str, Checkpoint])
    """Name -> file that the merge reads, besides the models."""
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the merged file says of it."""


@dataclass(frozen=True)
class Learning:
    """Where what is learnt comes from, and goes to."""

    statistics: Path | None = None
    """A folder with a calibrated method's statistics, a file a task; what is not there is measured, and put there."""
    coefficients: Path | None = None
    """A file with what an adapted method learnt; nothing is learnt then."""
    save_coefficients: Path | None = None
    """A file for what an adapted method learns, besides the one in the store."""
    trace: Path | None = None
    """A CSV file with a row for each step of an adapted method."""
    plot: Path | None = None
    """A picture of that."""
    tensorboard: Path | None = None
    """A folder that gets the same for TensorBoard."""

    def check(self, output: Output) -> None:
        """Raises UsageError if the method cannot use a file, or it cannot be written."""
        name, corrects = name_of(output.method), isinstance(output.method, RepresentationSurgery)
        learns = corrects or isinstance(output.method, Adapted)
        if self.statistics and not isinstance(output.method, Calibrated):
            raise UsageError(f"--statistics: method `{name}` measures nothing")
        given = {
            "--coefficients": self.coefficients,
            "--save-coefficients": self.save_coefficients,
            "--trace": self.trace,
            "--tensorboard": self.tensorboard,
            "--plot": self.plot,
        }
        for option, path in given.items():
            if path and not learns:
                raise UsageError(f"{option}: method `{name}` learns no coefficients")
        if self.plot and corrects:
            raise UsageError(
                f"--plot: there is no picture of what `{name}` learns", "`--trace` writes a table"
            )
        if self.coefficients and self.save_coefficients:
            raise UsageError(
                "--save-coefficients: with `--coefficients` nothing is learnt that could be saved"
            )
        targets: list[tuple[Path, tuple[str, ...]]] = [(output.target, ())] if output.target.suffix else []
        targets += [(self.save_coefficients, (".safetensors",))] if self.save_coefficients else []
        targets += [(self.trace, (".csv",))] if self.trace else []
        if self.tensorboard:
            from mergecli.events import require_tensorboard

            require_tensorboard()
            check_target(self.tensorboard, folder=True)
        if self.plot:
            from mergecli.plots import require_matplotlib

            require_matplotlib(self.plot)
            targets.append((self.plot, ()))
        check_targets(targets, {"coefficients": self.coefficients} if self.coefficients else {})

    def refuse_inputs(self, output: Output, inputs: Mapping[str, Path]) -> None:
        """Raises UsageError if a file that is to be written is one that is read."""
        for target in (output.target, self.save_coefficients, self.trace, self.plot):
            if target is not None:
                refuse_inputs(target, inputs)

    def learn(self, models: Models, output: Output, stack: ExitStack, progress: Progress | None) -> Lesson:
        """What the output's method learns of images, or has learnt; files stay open until `stack` ends."""
        method, recipe = output.method, output.recipe
        if isinstance(method, Calibrated):
            from mergecli.measured import statistics

            stored = statistics(models, method, recipe, stack, progress, self.statistics)
            return Lesson(output, stored, stored.files, stored.about)
        if isinstance(method, Adapted):
            from mergecli.adapting import coefficients

            used, learnt, file = coefficients(models, output, stack, progress, self)
            about = {"adapted_on": file.metadata["adapted_on"]}
            return Lesson(replace(output, method=used), learnt, {"coefficients": file}, about)
        if isinstance(method, RepresentationSurgery):
            from mergecli.correcting import surgery

            return surgery(models, output, stack, progress, self)
        return Lesson(output)
