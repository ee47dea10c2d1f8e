"""Merge fine-tuned CLIP vision models: the program's commands as Python functions, each imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergecli.caching import cache as cache
    from mergecli.engine import Merged as Merged
    from mergecli.engine import merge as merge
    from mergecli.errors import MergecliError as MergecliError
    from mergecli.evaluation import Evaluation as Evaluation
    from mergecli.evaluation import evaluate as evaluate
    from mergecli.extraction import Extracted as Extracted
    from mergecli.extraction import extract as extract
    from mergecli.fetching import Fetched as Fetched
    from mergecli.fetching import fetch as fetch
    from mergecli.finetuning import Finetuned as Finetuned
    from mergecli.finetuning import finetune as finetune
    from mergecli.inspection import info as info
    from mergecli.measuring import Measured as Measured
    from mergecli.measuring import measure as measure
    from mergecli.pool import ModelPool as ModelPool
    from mergecli.recipe import Recipe as Recipe
    from mergecli.reporting import report as report
    from mergecli.similarity import Similarities as Similarities
    from mergecli.similarity import cos_sim as cos_sim
    from mergecli.sweep_scores import Swept as Swept
    from mergecli.sweep_scores import sweep as sweep
    from mergecli.vectors import taskvector as taskvector

_HOMES = {
    "cache": "caching", "merge": "engine", "Merged": "engine", "MergecliError": "errors", "evaluate": "evaluation",
    "Evaluation": "evaluation", "Extracted": "extraction", "extract": "extraction", "fetch": "fetching", "Fetched": "fetching", "finetune": "finetuning", "Finetuned": "finetuning",
    "info": "inspection", "measure": "measuring", "Measured": "measuring", "ModelPool": "pool", "Recipe": "recipe", "cos_sim": "similarity", "Similarities": "similarity",
    "report": "reporting", "sweep": "sweep_scores", "Swept": "sweep_scores", "taskvector": "vectors",
}  # fmt: skip

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from mergecli.provenance import version

        return version()
    if name not in _HOMES:
        raise AttributeError(f"module 'mergecli' has no attribute {name!r}")
    return getattr(import_module(f"mergecli.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
