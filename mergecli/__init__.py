"""Merge fine-tuned CLIP vision models: the program's commands as Python functions, each imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Every public name stands here once. Type checkers follow these imports; `_homes` reads the lines.
    from mergecli.evaluation.continual import Chained as Chained
    from mergecli.evaluation.continual import continual as continual
    from mergecli.evaluation.evaluate import evaluate as evaluate
    from mergecli.evaluation.search import Searched as Searched
    from mergecli.evaluation.search import search as search
    from mergecli.evaluation.sweep import Swept as Swept
    from mergecli.evaluation.sweep import sweep as sweep
    from mergecli.formats.export import Exported as Exported
    from mergecli.formats.export import export as export
    from mergecli.formats.info import info as info
    from mergecli.hub.doctor import Examined as Examined
    from mergecli.hub.doctor import doctor as doctor
    from mergecli.hub.fetch import Fetched as Fetched
    from mergecli.hub.fetch import LockNotWrittenError as LockNotWrittenError
    from mergecli.hub.fetch import fetch as fetch
    from mergecli.hub.push import Pushed as Pushed
    from mergecli.hub.push import push as push
    from mergecli.merging.cos_sim import Similarities as Similarities
    from mergecli.merging.cos_sim import cos_sim as cos_sim
    from mergecli.merging.extract import Extracted as Extracted
    from mergecli.merging.extract import extract as extract
    from mergecli.merging.learning.measure import Measured as Measured
    from mergecli.merging.learning.measure import measure as measure
    from mergecli.merging.merge import Merged as Merged
    from mergecli.merging.merge import merge as merge
    from mergecli.merging.pool import ModelPool as ModelPool
    from mergecli.merging.recommend import Recommendation as Recommendation
    from mergecli.merging.recommend import recommend as recommend
    from mergecli.merging.taskvector import taskvector as taskvector
    from mergecli.recipe.schema import Recipe as Recipe
    from mergecli.results.plan import Plan as Plan
    from mergecli.results.plan import plan as plan
    from mergecli.results.report import report as report
    from mergecli.results.result import Evaluation as Evaluation
    from mergecli.results.result import Evaluations as Evaluations
    from mergecli.results.result import TaskScore as TaskScore
    from mergecli.results.tables import Table as Table
    from mergecli.runtime.engines.contract import Engine as Engine
    from mergecli.runtime.engines.grid import FailedUnitsError as FailedUnitsError
    from mergecli.runtime.errors import HubError as HubError
    from mergecli.runtime.errors import InputError as InputError
    from mergecli.runtime.errors import MergecliError as MergecliError
    from mergecli.runtime.errors import MergecliWarning as MergecliWarning
    from mergecli.runtime.errors import UsageError as UsageError
    from mergecli.runtime.progress import Progress as Progress
    from mergecli.storage.cache import cache as cache
    from mergecli.storage.checksums import DamagedFileError as DamagedFileError
    from mergecli.training.each import finetune_each as finetune_each
    from mergecli.training.finetune import Finetuned as Finetuned
    from mergecli.training.finetune import finetune as finetune
    from mergecli.training.loop import DivergedError as DivergedError


def _homes() -> dict[str, str]:
    """Public name -> the module that it is imported from."""
    from pathlib import Path  # the program draws its first line before it imports this

    lines = Path(__file__).read_text("utf-8").splitlines()
    imports = [line.split() for line in lines if line.startswith("    from mergecli.")]
    return {name: module for _, module, _, name, *_ in imports}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from mergecli.storage.metadata import version

        return version()
    homes = _homes()
    if name == "__all__":
        return sorted(homes)
    if name not in homes:
        raise AttributeError(f"module 'mergecli' has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)


def __dir__() -> list[str]:
    return [*sorted(_homes()), "__version__"]
