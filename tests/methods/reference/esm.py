"""ESM of whole models from what goes into every layer, with full decompositions in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import nearest_orthogonal, svd
from tests.methods.reference._weights import Weights, floats


def esm_matrix(deltas: Sequence[Tensor], inputs: Sequence[Tensor], gain: float = 2.0) -> Tensor:
    """(O, I) M of one weight, from (O, I) task vectors and the (rows, I) inputs of each task's layer."""
    most = max(1, len(deltas[0]) // len(deltas))
    norms = torch.stack([delta.norm() for delta in deltas])
    lefts, rights = [], []
    for delta, x, norm in zip(deltas, inputs, norms, strict=True):
        _, roots, right = svd(x @ delta.T)
        values = torch.zeros(most, dtype=torch.float64)
        count = min(most, int((roots.square() > 1e-10 * roots[0].square()).sum()))
        values[:count] = roots[:count].square()
        directions = torch.zeros(len(delta), most, dtype=torch.float64)
        directions[:, :count] = right[:count].T
        weights = (values / values.mean()) ** 0.15
        weights[count:] = 0
        weights /= weights.mean()
        lefts.append(directions * weights)
        rights.append((norm / norms.mean()) ** 2 * weights[:, None] * (directions.T @ delta))
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    columns = right.norm(dim=0)
    right = right * (columns / columns.mean()) ** 2
    left, right = left[:, left.norm(dim=0) > 0], right
    right = right[torch.cat([part.norm(dim=0) > 0 for part in lefts])]
    middle = [
        float(torch.linalg.svdvals(full).sum()) / min(full.shape)
        for full in (torch.cat(lefts, dim=1), torch.cat(rights) * (columns / columns.mean()) ** 2)
    ]
    return gain * middle[0] * middle[1] * nearest_orthogonal(left) @ nearest_orthogonal(right)


def tsv_matrix(deltas: Sequence[Tensor]) -> Tensor:
    k = max(1, min(deltas[0].shape) // len(deltas))
    parts = [svd(delta) for delta in deltas]
    left = nearest_orthogonal(torch.cat([u[:, :k] for u, _, _ in parts], dim=1))
    right = nearest_orthogonal(torch.cat([v[:k] for _, _, v in parts]))
    return left @ torch.diag(torch.cat([s[:k] for _, s, _ in parts])) @ right


def esm(
    base: Weights,
    tuned: Sequence[Weights],
    inputs: Sequence[Mapping[str, Tensor]],
    alpha: float,
    *,
    fuse: bool,
) -> Weights:
    def deltas_of(name: str) -> list[Tensor]:
        return [model[name].double() - base[name].double() for model in tuned]

    merged: dict[str, Tensor] = {}
    for name in inputs[0]:
        if "out_proj" in name:
            merged[name] = tsv_matrix(deltas_of(name))
        elif "q_proj" in name and fuse:
            names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            stacked = [torch.cat(parts) for parts in zip(*map(deltas_of, names), strict=True)]
            merged[name] = esm_matrix(stacked, [each[name] for each in inputs])
        elif not (fuse and re.search("[kv]_proj", name)):
            merged[name] = esm_matrix(deltas_of(name), [each[name] for each in inputs])
    kinds = {name: re.sub(r"layers.[0-9]+", "", name) for name in merged}
    factors = {}
    for name, value in merged.items():
        norms = [float(merged[other].norm()) for other in merged if kinds[other] == kinds[name]]
        factors[name] = (float(value.norm()) / (sum(norms) / len(norms))) ** 2
    for name in list(merged):
        merged[name] = merged[name] * factors[name] * (1 if "out_proj" in name else alpha)
        if "q_proj" in name and fuse:
            for part, rows in zip("qkv", merged.pop(name).chunk(3), strict=True):
                merged[name.replace("q_proj", f"{part}_proj")] = rows
    for name, value in floats(base).items():
        if name not in merged:
            deltas = deltas_of(name)
            merged[name] = tsv_matrix(deltas) if value.dim() == 2 else sum(deltas) / len(deltas)
    return {name: (value + merged[name]).float() for name, value in floats(base).items()}
