"""DARE: drop entries of the task vectors at random and enlarge the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

from mergecli.methods._base import Group, Method
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import Range
from mergecli.methods.task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class Dare(Modifier):
    """theta = what `of` makes of the task vectors  t_i = m_i tau_i / (1 - p),  m_i = 1 with probability 1 - p, else 0

    Every entry of every task is drawn by itself; the numbers depend on the recipe's seed, and on the names of tensor
    and task. Without `rescale` the kept entries are not divided by 1 - p. PEFT and FusionBench do the same; mergekit
    scales each tensor back to its L1 norm in place of dividing by 1 - p.
    """

    title: ClassVar[str] = (
        "entries of the task vectors dropped at random, the rest enlarged, then another method"
    )
    paper: ClassVar[str] = (
        "Yu et al., Language models are super mario, ICML 2024, arXiv 2311.03099, section 3"
    )
    also_called: ClassVar[Mapping[str, str]] = {"dare_linear": "", "drop_and_rescale": ""}

    of: Method = TaskArithmetic()  # noqa: RUF009
    """The method that merges the thinned task vectors; not one that drops entries at random itself."""
    drop_rate: Annotated[float, Range(0, 1, open_high=True)] = 0.5
    """p, the probability that an entry is dropped; 0 drops none."""
    rescale: bool = True
    """Whether kept entries are divided by 1 - p, so that each task vector keeps its expected value."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        inner = settings.get("of")
        while isinstance(inner, Mapping):
            table = cast("Mapping[str, Any]", inner)
            if (name := table.get("name")) in ("dare", "della"):
                return [("of", f"`{name}` drops entries by the same random numbers: drop them once")]
            inner = table.get("of")
        return []

    def before(self, group: Group, surveyed: Any, /) -> Group:
        del surveyed
        if self.drop_rate == 0:
            return group
        scale = 1 / (1 - self.drop_rate) if self.rescale else 1.0
        for task, row in enumerate(group.deltas):
            row.mul_(group.uniform(task).ge_(self.drop_rate).mul_(scale))
        return group
