"""What a method learns from images before its merge."""

from __future__ import annotations

from contextlib import ExitStack

from mergecli.merging.learning.files import Learned, Learning, LearningFiles
from mergecli.merging.merge_target import MergeTarget
from mergecli.merging.models import Models
from mergecli.methods._base import DataDriven


def learning(models: Models, target: MergeTarget, files: LearningFiles, stack: ExitStack) -> Learning:
    """What the target's method has to learn, or has learned before; all of it is checked. Files stay open until `stack` ends."""
    if not isinstance(target.method, DataDriven):
        nothing = Learned(target)
        return Learning(nothing, (), lambda _: nothing)
    if target.method.kept_as == "statistics":
        from mergecli.merging.learning.statistics import statistics

        return statistics(models, target, files, stack)
    from mergecli.merging.learning.coefficients import coefficients

    return coefficients(models, target, files, stack)
