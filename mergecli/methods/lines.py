"""LiNeS: deeper layers keep more of the merged task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, Groups, Method
from mergecli.methods._depth import depths
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import Range
from mergecli.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lines(Modifier):
    """theta = theta_0 + (alpha + beta d) (theta' - theta_0),  theta' what `of` merges,  d the depth of the tensor

    d = l / (L - 1) in layer l = 0 ... L - 1, read from the tensor's name; 0 before the layers (embeddings and the norm
    after them), 1 behind them (post-layernorm, projection, head). The defaults are ours; the paper chooses both by
    the number of tasks and on validation images.
    """

    title: ClassVar[str] = "deeper layers keep more of what another method merges"
    paper: ClassVar[str] = "Wang et al., LiNeS, ICLR 2025, arXiv 2410.17146, equation 3"

    of: Method = TaskArithmetic()  # noqa: RUF009
    """The method whose merged task vector is scaled."""
    first_layer: Annotated[float, Range()] = 0.5
    """alpha, the scale of the first layer and of all before it; 1, with an increase of 0, changes nothing."""
    increase: Annotated[float, Range()] = 0.5
    """beta, by how much the last layer's scale, and of all behind it, is larger than the first's."""

    def survey(self, groups: Groups, /) -> tuple[Any, dict[str, float]]:
        return super().survey(groups), depths(groups.tensors)

    def inner(self, surveyed: tuple[Any, dict[str, float]], /) -> Any:
        return surveyed[0]

    def after(self, group: Group, merged: Tensor, surveyed: tuple[Any, dict[str, float]], /) -> Tensor:
        depth = surveyed[1][group.members[0] if group.members else group.name]
        scale = self.first_layer + self.increase * depth
        return merged if scale == 1 else merged.sub_(group.base).mul_(scale).add_(group.base)
