"""Concrete masks: one number in (0, 1) for each entry of the model, random and learned, the same for all tasks.

Tang et al., Concrete Subspace Learning, arXiv 2312.06173; the distribution: Maddison et al., arXiv 1611.00712.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Objective
from mergecli.methods._base import Group, uniform
from mergecli.methods._learned import LearnedTensors, State

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["sample", "expected", "discrete"]
SMALLEST = 1e-30
"""Stands for the mean of a mask whose entries are all 0."""
WIDTH = 256
"""A multiple of the number of entries that a processor computes at once."""
FINAL = "final mask"
"""The label of the random numbers of the mask that is kept."""


def mask_of(kind: Kind, logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """(...) the mask: a sample of the concrete distribution, the probability of an entry, or 0 or 1 with that probability."""
    import torch

    if kind == "expected":
        return logits.sigmoid()
    if kind == "discrete":
        return (uniform < logits.sigmoid()).float()
    # logit(u) of uniform u is logistic noise: with it a sigmoid is a smooth coin toss, whose gradient with respect to the
    # logits exists. u = 0 or 1 would give infinity.
    tiny = torch.finfo(torch.float32).eps
    noise = uniform.clamp(tiny, 1 - tiny)
    return ((noise.log() - (1 - noise).log() + logits) / temperature).sigmoid()


def logits_key(name: str) -> str:
    """The key of a tensor's mask logits in a state and in a file."""
    return f"logits.{name}"


def begin_masks(objective: Objective, initial: float) -> State:
    """Logits of every entry and their moments."""
    import torch

    state: State = {}
    for name, weight in objective.weights.items():
        state[logits_key(name)] = torch.full_like(weight, initial)
        state[f"mean.{name}"], state[f"square.{name}"] = torch.zeros_like(weight), torch.zeros_like(weight)
    return state


def sampled(objective: Objective, state: State, name: str, label: str, temperature: float) -> Tensor:
    """(...) a sample of one tensor's mask."""
    drawn = objective.uniform(name, label).view(objective.weights[name].shape)
    return mask_of("sample", state[logits_key(name)], drawn, temperature)


def rescaled(mask: Tensor) -> Tensor:
    """(...) m / mean(m) over a tensor; 0 where all of it is."""
    return mask / mask.mean().clamp(min=SMALLEST)


def mask_gradient(objective: Objective, mask: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """(...) the gradient with respect to one tensor's logits.

    Args:
        gradient: (...) with respect to the rescaled mask; overwritten.

    The rescaled mask is r = m / mean(m), so dL/dm_k = s_k / mean(m) - sum_j s_j m_j / (n mean(m)^2), and
    dm/dlogit = m (1 - m) / temperature.
    """
    mean = mask.mean().clamp(min=SMALLEST)
    shared = (gradient * mask).sum() / (mean * max(mask.numel(), 1))
    by_mask = gradient.sub_(shared).div_(mean)
    return objective.total(by_mask.mul_(mask).mul_(1 - mask).div_(temperature))


def move_masks(
    state: State, gradients: Mapping[str, Tensor], rate: float, step: int, decay: float = 0.0
) -> None:
    """Step number `step`, from 1, of Adam on all logits, which first decay by the share `rate * decay`."""
    for name, gradient in gradients.items():
        moments = state[f"mean.{name}"], state[f"square.{name}"]
        if decay:
            state[logits_key(name)].mul_(1 - rate * decay)
        adam_step(state[logits_key(name)], gradient, *moments, rate, step)


def kept_masks(objective: Objective, state: State, kind: Kind, temperature: float) -> State:
    """The logits and, in the order of the tensors, (P,) the means of the mask that is kept."""
    import torch

    means: list[float] = []
    for name, weight in objective.weights.items():
        drawn = objective.uniform(name, FINAL).view(weight.shape)
        mask = mask_of(kind, state[logits_key(name)], drawn, temperature)
        means.append(mean_of(mask))
    logits = {key: each for key, each in state.items() if key.startswith(logits_key(""))}
    return {**logits, "mask_means": torch.tensor(means)}


def mean_of(mask: Tensor) -> float:
    """The mean of a mask, 1 if it has no entry."""
    return float(mask.double().mean()) if mask.numel() else 1.0


def mask_means(
    learned: LearnedTensors, tensors: Mapping[str, tuple[int, ...]], kind: Kind, temperature: float
) -> Tensor:
    """(P,) the means of masks of a kind, of the logits that were learned."""
    import torch

    means: list[float] = []
    for name in learned.names:
        shape = tensors[name]
        logits = learned.read(logits_key(name), 0, math.prod(shape)).view(shape)
        drawn = uniform(learned.seed, name, FINAL, 0, logits.numel()).view(shape).to(logits.device)
        means.append(mean_of(mask_of(kind, logits, drawn, temperature)))
    return torch.tensor(means)


def mask_shapes(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of what `kept_masks` gives."""
    return {**{logits_key(name): shape for name, shape in tensors.items()}, "mask_means": (len(tensors),)}


def final_mask(learned: LearnedTensors | Any, group: Group, kind: Kind, temperature: float) -> Tensor:
    """(...) the rescaled mask that is applied, for a block of a tensor; 0 if the whole tensor's mask is."""
    from torch.nn.functional import pad

    count = group.shape.numel()
    logits = learned.read(logits_key(group.name), group.start, group.start + count)
    drawn = group.drawn(FINAL, learned.seed).view(-1)
    # Vector units compute a row in steps of several entries, and the rest of it by other code, which rounds otherwise.
    # Padding makes every entry part of a full step, so that the size of the blocks changes no byte.
    logits, drawn = (pad(each, (0, -count % WIDTH)) for each in (logits.to(drawn.device), drawn))
    mask = mask_of(kind, logits, drawn, temperature)[:count].view(group.shape)
    mean = float(learned.tensors["mask_means"][learned.names.index(group.name)])
    return mask / mean if mean else mask
