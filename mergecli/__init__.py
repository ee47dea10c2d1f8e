"""Merge fine-tuned CLIP vision models: the program's commands as Python functions, each imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergecli.evaluation.evaluate import evaluate as evaluate
    from mergecli.evaluation.sweep import Swept as Swept
    from mergecli.evaluation.sweep import sweep as sweep
    from mergecli.formats.info import info as info
    from mergecli.hub.fetch import Fetched as Fetched
    from mergecli.hub.fetch import fetch as fetch
    from mergecli.merging.cos_sim import Similarities as Similarities
    from mergecli.merging.cos_sim import cos_sim as cos_sim
    from mergecli.merging.extract import Extracted as Extracted
    from mergecli.merging.extract import extract as extract
    from mergecli.merging.learning.measure import Measured as Measured
    from mergecli.merging.learning.measure import measure as measure
    from mergecli.merging.merge import Merged as Merged
    from mergecli.merging.merge import merge as merge
    from mergecli.merging.pool import ModelPool as ModelPool
    from mergecli.merging.taskvector import taskvector as taskvector
    from mergecli.recipe.schema import Recipe as Recipe
    from mergecli.results.report import report as report
    from mergecli.results.result import Evaluation as Evaluation
    from mergecli.runtime.errors import MergecliError as MergecliError
    from mergecli.storage.cache import cache as cache
    from mergecli.training.finetune import Finetuned as Finetuned
    from mergecli.training.finetune import finetune as finetune

_HOMES = {
    "cache": "storage.cache", "merge": "merging.merge", "Merged": "merging.merge", "MergecliError": "runtime.errors", "evaluate": "evaluation.evaluate",
    "Evaluation": "results.result", "Extracted": "merging.extract", "extract": "merging.extract", "fetch": "hub.fetch", "Fetched": "hub.fetch", "finetune": "training.finetune", "Finetuned": "training.finetune",
    "info": "formats.info", "measure": "merging.learning.measure", "Measured": "merging.learning.measure", "ModelPool": "merging.pool", "Recipe": "recipe.schema", "cos_sim": "merging.cos_sim", "Similarities": "merging.cos_sim",
    "report": "results.report", "sweep": "evaluation.sweep", "Swept": "evaluation.sweep", "taskvector": "merging.taskvector",
}  # fmt: skip

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from mergecli.storage.metadata import version

        return version()
    if name not in _HOMES:
        raise AttributeError(f"module 'mergecli' has no attribute {name!r}")
    return getattr(import_module(f"mergecli.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
