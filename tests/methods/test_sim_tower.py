"""Towers that find the task of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergecli.methods import _sim_tower
from mergecli.methods._sim_tower import SimTower


class Output(dict[str, Tensor]):
    @property
    def pooler_output(self) -> Tensor:
        return self["pooler_output"]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, pixel_values: Tensor) -> Output:
        return Output(pooler_output=self.linear(pixel_values), last_hidden_state=pixel_values)


def installed(tower: Tower, asked: list[tuple[str, int]]) -> SimTower:
    """Six tasks: image e_i is of task i % 3 or i % 3 + 3, by its sign; task t multiplies by t + 1."""

    def weights(name: str, task: int) -> Tensor:
        asked.append((name, task))
        return torch.eye(3) * (task + 1)

    means = torch.cat([torch.eye(3), -torch.eye(3)])
    return SimTower.around(tower, weights, means, torch.zeros(6, 1, 3), torch.eye(3))


def test_images_come_back_in_their_order_and_few_towers_are_held() -> None:
    tower, asked = Tower(), list[tuple[str, int]]()
    found = installed(tower, asked)
    images = torch.cat([torch.eye(3), -torch.eye(3)])[[5, 0, 3, 1, 0, 4, 2]]
    got = tower(pixel_values=images)
    assert found.chosen.tolist() == [5, 0, 3, 1, 0, 4, 2]
    factors = torch.tensor([6.0, 1, 4, 2, 1, 5, 3])
    assert got["pooler_output"].equal(images * factors[:, None])
    assert got["last_hidden_state"].equal(images)
    assert len(asked) == 6
    tower(pixel_values=images[:1])
    assert len(asked) == 6, "the towers that were used last are held"
    assert len(found._held) == _sim_tower.KEPT
    tower(pixel_values=torch.eye(3)[:1])
    assert asked[6:] == [("linear.weight", 0)]
    found.remove()
    assert tower(pixel_values=images)["pooler_output"].equal(images)


def test_no_weights_are_copied_to_install() -> None:
    tower = Tower()
    found = installed(tower, [])
    assert found.body is not tower
    assert next(found.body.parameters()) is tower.linear.weight
    assert list(tower.state_dict()) == ["linear.weight"]
    assert not found.keeps_batches_whole
    assert found.parameters == {}
