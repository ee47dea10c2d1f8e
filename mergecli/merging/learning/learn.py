"""What a method learns from images before its merge."""

from __future__ import annotations

from contextlib import ExitStack

from mergecli.merging.learning.files import Learned, Learning, LearningFiles
from mergecli.merging.merge_target import MergeTarget
from mergecli.merging.models import Models
from mergecli.methods._base import DataDriven
from mergecli.methods._calibrated import measured_by


def learning(models: Models, target: MergeTarget, files: LearningFiles, stack: ExitStack) -> Learning:
    """What the target's method has to learn, or has learned before; all of it is checked. Files stay open until `stack` ends."""
    if measured_by(target.method) is not None:
        from mergecli.merging.learning.statistics import statistics

        return statistics(models, target, files, stack)
    if not isinstance(target.method, DataDriven):
        nothing = Learned(target)
        return Learning(nothing, (), lambda _: nothing)
    from mergecli.merging.learning.coefficients import coefficients

    return coefficients(models, target, files, stack)
