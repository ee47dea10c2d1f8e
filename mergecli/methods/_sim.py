"""SiM: task-conditioned mixtures whose file finds the task of an image by itself, by the features of the pre-trained tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._calibrated import Calibrated, Layout, MayMeasure, Probe, Shapes, Statistics
from mergecli.methods._mixture import Conditioned, Installed, Part, Read, Routed, Routing
from mergecli.methods._settings import Range
from mergecli.methods._svd import NEGLIGIBLE

if TYPE_CHECKING:
    from torch import Tensor, nn

MEANS, BASES, PROJECTION = "sim.means", "sim.bases", "sim.projection"
"""Keys of the (T, D) means and the (T, q, D) bases of the tasks' features, and of the (D, W) visual projection."""
_WIDTH = "post_layernorm.weight"
"""The end of the name of the tensor that has as many entries as the tower's output."""


@dataclass(frozen=True)
class FindsTask(MayMeasure, Conditioned, Routed):
    """Task-conditioned mixtures that can find the task: the rest of the class says how."""

    prefixes: ClassVar[tuple[str, ...]] = ("sim.",)
    own_tower: ClassVar[str] = "that task's tower"
    routes_batches: ClassVar[bool] = False
    merge_time: ClassVar[frozenset[str]] = frozenset()

    router: Literal["sim"] | None = None
    """What finds the task of an image: `sim` compares its features in the base's tower with those of `router_examples` images of
    each task, so that no task need be given (Son et al., SiM, arXiv 2606.22589); you give it if nothing does."""
    router_examples: Annotated[int, Range(1)] | None = None
    """With `router`: training images of each task that are looked at, without labels; 32 if it is not given."""
    feature_size: Annotated[int, Range(1)] | None = None
    """With `router`: how many numbers an image's features have; as many as the base's if it is not given."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        if settings.get("router") is not None:
            return []
        needless = [key for key in ("router_examples", "feature_size") if settings.get(key) is not None]
        return [(key, "is for a router, and `router` is not given") for key in needless]

    @property
    def is_routed(self) -> bool:
        return self.router is not None

    @property
    def sends_on(self) -> bool:
        return self.router is not None

    @property
    def support(self) -> Calibrated | None:
        return None if self.router is None else self._by_features

    @property
    def _by_features(self) -> SimSupport:
        """What measures the images that tasks are known by."""
        return SimSupport(examples=self.router_examples or 32, feature_size=self.feature_size or 0)

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        if self.router is None:
            return {}
        size, support = self.feature_size or 0, self._by_features
        return {
            MEANS: Part("F32", (tasks, size)),
            BASES: Part("F32", (tasks, support.directions, size)),
            PROJECTION: Part("F32", (size, _width(tensors))),
        }

    def measured_values(self, statistics: Statistics, tasks: int, /) -> dict[str, Tensor]:
        import torch

        if self.router is None:
            return {}
        means = torch.stack([statistics.read(task, _MEAN) for task in range(tasks)])
        bases = torch.stack([statistics.read(task, _BASIS) for task in range(tasks)])
        size = means.shape[1]
        projection = statistics.read(0, PROJECTION).view(size, -1)
        return {MEANS: means, BASES: bases.view(tasks, -1, size), PROJECTION: projection}

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        from mergecli.methods._sim_tower import SimTower

        del routing

        def weights(name: str, task: int) -> Tensor:
            return self.weights(f"{prefix}{name}", task, read)

        del tasks
        return SimTower.around(tower, weights, read(MEANS), read(BASES), read(PROJECTION))

    def projection(self, installed: Installed, own: nn.Linear, read: Read, name: str, /) -> nn.Module:
        from mergecli.methods._sim_tower import SimTower
        from mergecli.methods._task_towers import ImageProjections

        assert isinstance(installed, SimTower)

        def chosen() -> list[int]:
            return installed.chosen.tolist()

        def weights(task: int) -> Tensor:
            return self.weights(name, task, read)

        return ImageProjections(own, chosen, weights)


_MEAN, _BASIS = "sim.mean", "sim.basis"


@dataclass(frozen=True)
class SimSupport(Calibrated):
    """mu = mean f,  V = the first q right singular vectors of the rows f - mu,  f the unit features of a task's images in the base

    q = a tenth of the size of f, at least 1, at most the number of images. Where there are fewer directions the others are 0.
    """

    measured_as: ClassVar[str] = "sim"
    of_base: ClassVar[bool] = True
    title: ClassVar[str] = "means and subspaces of the features of each task's images"
    paper: ClassVar[str] = "Son et al., SiM, arXiv 2606.22589"

    examples: int = 32
    feature_size: int = 0

    @property
    def directions(self) -> int:
        """q."""
        return min(max(1, round(self.feature_size / 10)), self.examples)

    def layout(self, shapes: Shapes, /) -> Layout:
        return {
            _MEAN: ("F32", (self.feature_size,)),
            _BASIS: ("F32", (self.directions, self.feature_size)),
            PROJECTION: ("F32", (self.feature_size, _width(shapes))),
        }

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        import torch

        with torch.no_grad():
            features = [probe.features(batch).double() for batch in probe.batches(self.batch_size)]
        mean, basis = subspace(torch.cat(features), self.directions)
        yield _MEAN, mean.float()
        yield _BASIS, basis.float()
        yield PROJECTION, probe.projection.float()


def subspace(features: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """(D,) mean and (q, D) orthonormal rows, of (N, D) unit features; rows that there are no directions for are 0."""
    import torch

    mean = features.mean(0)
    _, values, right = torch.linalg.svd(features - mean, full_matrices=False)
    kept = right[values > NEGLIGIBLE * values[:1]][:directions]
    basis = features.new_zeros(directions, features.shape[1])
    basis[: len(kept)] = kept
    return mean, basis


def _width(tensors: Mapping[str, tuple[int, ...]]) -> int:
    return next((shape[0] for name, shape in tensors.items() if name.endswith(_WIDTH)), 0)
