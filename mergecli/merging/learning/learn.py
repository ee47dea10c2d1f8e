"""What a method learns from images before its merge."""

from __future__ import annotations

from contextlib import ExitStack

from mergecli.merging.learning.files import Learned, LearningFiles
from mergecli.merging.merge_target import MergeTarget
from mergecli.merging.models import Models
from mergecli.methods._base import DataDriven
from mergecli.runtime.progress import Progress


def learn(
    models: Models, target: MergeTarget, files: LearningFiles, stack: ExitStack, progress: Progress | None
) -> Learned:
    """What the target's method learns now or has learned before; files stay open until `stack` ends."""
    if not isinstance(target.method, DataDriven):
        return Learned(target)
    if target.method.kept_as == "statistics":
        from mergecli.merging.learning.statistics import statistics

        return statistics(models, target, files, stack, progress)
    from mergecli.merging.learning.coefficients import coefficients

    return coefficients(models, target, files, stack, progress)
