"""Methods that change the input or the output of another method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mergecli.methods._base import Group, Groups, Method, TwoPass, Unit, merge_group

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
    def reads(self) -> int:
        return self.of.reads

    def survey(self, groups: Groups, /) -> Any:
        return self.of.survey(_Changed(groups, self)) if isinstance(self.of, TwoPass) else None

    def merge(self, group: Group, surveyed: Any, /) -> Tensor:
        seen = self.before(group.copy() if self.keeps_group else group)
        merged = merge_group(self.of, seen, surveyed)
        return self.after(group, merged, surveyed)

    def before(self, group: Group, /) -> Group:
        """The group that the other method gets."""
        return group

    def after(self, group: Group, merged: Tensor, surveyed: Any, /) -> Tensor:
        """(...) the merged weights, from those of the other method."""
        del group, surveyed
        return merged


class _Changed:
    """Passes over groups as a modifier changes them."""

    def __init__(self, groups: Groups, modifier: Modifier) -> None:
        self._groups, self._modifier = groups, modifier

    @property
    def tensors(self) -> Sequence[str]:
        return self._groups.tensors

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        return map(self._modifier.before, self._groups(sample))

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        return self._groups.map(lambda group: look(self._modifier.before(group)), sample)
