"""Methods that change the input or the output of another method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mergecli.methods._base import Group, Groups, Method, Shelf, TwoPass, Unit, merge_group

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Modifier(TwoPass):
    """Methods that change the input (`before`) or the output (`after`) of another method, the setting `of`."""

    kind = "modifiers"
    passes: ClassVar[int] = 1
    keeps_group: ClassVar[bool] = False
    """Whether `after` looks at the group, which the other method may have overwritten: then it gets a copy."""

    of: Method

    @property
    def unit(self) -> Unit:
        return max(super().unit, self.of.unit)

    @property
    def fuses(self) -> bool:
        return self.of.fuses

    @property
    def keeps_projection(self) -> bool:
        return self.of.keeps_projection

    @property
    def reads(self) -> int:
        return self.of.reads

    @property
    def against_adapters(self) -> str:
        return self.of.against_adapters

    def survey(self, groups: Groups, /) -> Any:
        return self.survey_of(groups, None)

    def survey_of(self, groups: Groups, surveyed: Any, /) -> Any:
        """What the other method surveys of groups as `before` changes them."""
        if not isinstance(self.of, TwoPass):
            return None
        return self.of.survey(ChangedGroups(groups, lambda group: self.before(group, surveyed)))

    def inner(self, surveyed: Any, /) -> Any:
        """The other method's share of what this one surveyed."""
        return surveyed

    def merge(self, group: Group, surveyed: Any, /) -> Tensor:
        seen = self.before(group.copy() if self.keeps_group else group, surveyed)
        merged = merge_group(self.of, seen, self.inner(surveyed))
        return self.after(group, merged, surveyed)

    def before(self, group: Group, surveyed: Any, /) -> Group:
        """The group that the other method gets."""
        del surveyed
        return group

    def after(self, group: Group, merged: Tensor, surveyed: Any, /) -> Tensor:
        """(...) the merged weights, from those of the other method."""
        del group, surveyed
        return merged


class ChangedGroups:
    """Passes over groups that are changed before they are looked at."""

    def __init__(self, groups: Groups, change: Callable[[Group], Group]) -> None:
        self._groups, self._change = groups, change

    @property
    def tensors(self) -> Sequence[str]:
        return self._groups.tensors

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        return map(self._change, self._groups(sample))

    def shelf(self) -> Shelf:
        return self._groups.shelf()

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        return self._groups.map(lambda group: look(self._change(group)), sample)
