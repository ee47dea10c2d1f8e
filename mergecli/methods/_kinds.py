"""What a merging method is: settings in a frozen dataclass, and one or two functions of tensors.

Letters in shapes: T tasks, n entries of a block, `...` the tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Generator, Size, Tensor


class Group:
    """One named tensor, or a block of its entries, across all models, in float32 and in the recipe's order.

    The tensors belong to whoever receives the group: methods may overwrite them.
    """

    def __init__(
        self,
        name: str,
        base: Tensor | None,
        rows: Tensor,
        are_deltas: tuple[bool, ...],
        seed: int,
        block: int,
    ) -> None:
        self.name = name
        self._base = base
        self._rows = rows
        self._are_deltas = are_deltas
        self._seed = seed
        self._block = block

    @property
    def tasks(self) -> int:
        """T, the number of fine-tuned models."""
        return len(self._rows)

    @property
    def shape(self) -> Size:
        """The shape of the base, of each row of `deltas`, and of the result."""
        return self._rows.shape[1:]

    @property
    def base(self) -> Tensor:
        """(...) the base's weights."""
        if self._base is None:
            raise ValueError("this method was not given a base: set `needs_base`")
        return self._base

    @property
    def tuned(self) -> Tensor:
        """(T, ...) the fine-tuned weights."""
        return self._as_deltas(wanted=False)

    @property
    def deltas(self) -> Tensor:
        """(T, ...) the task vectors, fine-tuned minus base."""
        return self._as_deltas(wanted=True)

    def _as_deltas(self, *, wanted: bool) -> Tensor:
        for row, is_delta in zip(self._rows, self._are_deltas, strict=True):
            if wanted and not is_delta:
                row.sub_(self.base)
            elif is_delta and not wanted:
                row.add_(self.base)
        self._are_deltas = (wanted,) * self.tasks
        return self._rows

    @property
    def rng(self) -> Generator:
        """A CPU generator that depends on the recipe's seed, the tensor's name and the block only."""
        import hashlib

        import torch

        text = f"{self._seed} {self.name} {self._block}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


class Groups(Protocol):
    """One pass over all tensors of all models; each call reads the files once."""

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        """The groups in order; with `sample = s`, only about one entry in s of every tensor, evenly spread."""
        ...


@dataclass(frozen=True)
class Method:
    """What all kinds share. A method's docstring is its equation; each setting's docstring says what it does."""

    title: ClassVar[str]
    """The method's name and one line about it, for lists."""
    paper: ClassVar[str]
    """Where it comes from."""
    needs_base: ClassVar[bool] = True
    """Whether there is no merge without a base."""
    elementwise: ClassVar[bool] = True
    """Whether an entry of the result depends on the same entry of the models only: then blocks of entries do."""
    passes: ClassVar[int] = 1
    """How often every model is read from disk."""

    @classmethod
    def check(cls, tasks: int, settings: dict[str, Any]) -> list[tuple[str, str]]:
        """(setting, problem) pairs of settings that are each valid but do not fit `tasks` models."""
        del tasks, settings
        return []


@dataclass(frozen=True)
class PerTensor(Method):
    """Methods that look at one tensor at a time: one pass."""

    def merge(self, group: Group, /) -> Tensor:
        """(...) the merged weights of the group's tensor, float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class TwoPass(Method):
    """Methods that must have seen the whole model before they can merge a tensor."""

    passes: ClassVar[int] = 2

    def survey(self, groups: Groups, /) -> Any:
        """What `merge` needs to know of the whole model."""
        raise NotImplementedError

    def merge(self, group: Group, surveyed: Any, /) -> Tensor:
        """(...) the merged weights of the group's tensor, float32."""
        raise NotImplementedError


def total(rows: Tensor) -> Tensor:
    """(...) the sum of (T, ...) rows, added from the first to the last, so that it never depends on the layout."""
    result = rows[0].clone()
    for row in rows[1:]:
        result += row
    return result
