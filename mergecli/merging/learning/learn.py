"""What one output's method learns from images before the merge, by the kind of the method."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from mergecli.merging.learning.files import Learning, Lesson
from mergecli.merging.models import Models
from mergecli.merging.outputs import Output
from mergecli.methods._adapted import Adapted
from mergecli.methods._calibrated import Calibrated
from mergecli.methods.representation_surgery import RepresentationSurgery
from mergecli.runtime.progress import Progress


def learn(
    models: Models, output: Output, files: Learning, stack: ExitStack, progress: Progress | None
) -> Lesson:
    """What the output's method learns of images, or has learnt; files stay open until `stack` ends."""
    method, recipe = output.method, output.recipe
    if isinstance(method, Calibrated):
        from mergecli.merging.learning.statistics import statistics

        stored = statistics(models, method, recipe, stack, progress, files.statistics)
        return Lesson(output, stored, stored.files, stored.about)
    if isinstance(method, Adapted):
        from mergecli.merging.learning.adaptation import coefficients

        used, learnt, file = coefficients(models, output, stack, progress, files)
        about = {"adapted_on": file.metadata["adapted_on"]}
        return Lesson(replace(output, method=used), learnt, {"coefficients": file}, about)
    if isinstance(method, RepresentationSurgery):
        from mergecli.merging.learning.surgery import surgery

        return surgery(models, output, stack, progress, files)
    return Lesson(output)
