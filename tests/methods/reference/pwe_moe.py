"""PWE-MoE: a module of two linear layers for each block, autograd from the weighted losses to it; in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergecli.methods._base import uniform
from tests.methods.reference._adamerging_loop import Found, Sight, deltas_of
from tests.methods.reference._weights import Weights


def pwe_moe(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float,
    preference: Sequence[float] = (), start: float = 0.3, spread: float = 0.01,
) -> Found:  # fmt: skip
    deltas, tasks = deltas_of(base, tuned), len(tuned)
    blocks = list(dict.fromkeys(block for name in base if (block := block_of(name))))
    routers = made(len(blocks), tasks, start, spread)

    def merged(a: Tensor) -> Weights:
        found: Weights = {}
        for name, value in base.items():
            block = block_of(name)
            c = routers[blocks.index(block)](a) if block else torch.full((tasks,), start).double()
            found[name] = value.double() + sum(c[i] * delta[name] for i, delta in enumerate(deltas))  # type: ignore[operator]
        return found

    parameters = [each for router in routers for each in router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(steps, 1), eta_min=0.1 * learning_rate
    )
    trace: list[list[float]] = []
    for step in range(steps):
        waits = -torch.log(1 - uniform(0, "", f"preference {step}", 0, tasks).double())
        a = waits / waits.sum()
        losses = [sight_of(sight, place).loss(merged(a), step)[0] for place in range(tasks)]
        optimizer.zero_grad()
        sum(a[i] * loss for i, loss in enumerate(losses)).backward()  # type: ignore[union-attr]
        optimizer.step()
        falling.step()
        trace.append([float(loss.detach()) for loss in losses])
    wanted = torch.tensor(list(preference) or [1.0] * tasks).double()
    with torch.no_grad():
        return Found(merged(wanted / wanted.sum()), torch.empty(0), {}, trace)


def block_of(name: str) -> str:
    for kind in (".mlp.", ".self_attn."):
        if kind in name:
            return name[: name.index(kind) + len(kind)]
    return ""


def made(blocks: int, tasks: int, start: float, spread: float) -> list[nn.Sequential]:
    """The routers before the first step."""
    first, last = (
        drawn(f"router.{number}.weight", (blocks, *shape)) * spread
        for number, shape in enumerate(((2 * tasks, tasks), (tasks, 2 * tasks)))
    )
    routers: list[nn.Sequential] = []
    for number in range(blocks):
        router = nn.Sequential(nn.Linear(tasks, 2 * tasks), nn.ReLU(), nn.Linear(2 * tasks, tasks)).double()
        router[0].weight.data, router[2].weight.data = first[number], last[number]
        router[0].bias.data.zero_()
        router[2].bias.data.fill_(start)
        routers.append(router)
    return routers


def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    """Box and Muller."""
    radius, angle = (
        uniform(0, "", f"{key} {part}", 0, math.prod(shape)).double() for part in ("radius", "angle")
    )
    return (torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)).view(shape)


def sight_of(sight: Sight, place: int) -> Sight:
    """Of one task only."""
    return Sight(
        sight.classify, lambda draw: [each for each in sight.batches(draw) if each[0] == place], sight.experts
    )
