"""The methods of singular values as their papers write them: full decompositions, float64, one matrix after another.

Matrices are the tensors of two dimensions but the position embedding. They have full rank here, so that nothing depends
on which vectors a decomposition returns for singular values that are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.golden.naive import Weights, floats

Matrices = Callable[[Sequence[Tensor]], Tensor]


def by_matrix(
    base: Weights, tuned: Sequence[Weights], merge: Matrices, scaling_factor: float = 1.0
) -> Weights:
    """theta_0 + scaling_factor tau, tau from `merge` for matrices, else the mean of the task vectors."""
    result = {}
    for name, value in floats(base).items():
        deltas = [model[name].double() - value.double() for model in tuned]
        if value.dim() == 2 and value.numel() and "position" not in name:
            merged = merge(deltas)
        else:
            merged = sum(deltas) / len(deltas)
        result[name] = (value + scaling_factor * merged).float()
    return result


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix)
    return left @ right


def tsv_m(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    def merge(deltas: Sequence[Tensor]) -> Tensor:
        k = max(1, min(deltas[0].shape) // len(deltas))
        parts = [svd(delta) for delta in deltas]
        left = nearest_orthogonal(torch.cat([u[:, :k] for u, _, _ in parts], dim=1))
        right = nearest_orthogonal(torch.cat([v[:k] for _, _, v in parts]))
        return left @ torch.diag(torch.cat([s[:k] for _, s, _ in parts])) @ right

    return by_matrix(base, tuned, merge, scaling_factor)


def iso_c(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    def merge(deltas: Sequence[Tensor]) -> Tensor:
        left, values, right = svd(sum(deltas))  # type: ignore[arg-type]
        return left @ torch.diag(torch.full_like(values, float(values.mean()))) @ right

    return by_matrix(base, tuned, merge, scaling_factor)


def iso_cts(base: Weights, tuned: Sequence[Weights], scaling_factor: float, common_space: float) -> Weights:
    def merge(deltas: Sequence[Tensor]) -> Tensor:
        size, tasks = min(deltas[0].shape), len(deltas)
        own = round((size - int(size * common_space)) / tasks)
        common = size - own * tasks
        left, values, right = (part for part in svd(sum(deltas)))  # type: ignore[arg-type]
        left, values, right = left[:, :common], values[:common], right[:common]
        parts = [svd(delta - left @ left.T @ delta) for delta in deltas]
        all_left = torch.cat([*(u[:, :own] for u, _, _ in parts), left], dim=1)
        all_right = torch.cat([*(v[:own] for _, _, v in parts), right])
        mean = torch.cat([*(s[:own] for _, s, _ in parts), values]).mean()
        return (
            nearest_orthogonal(all_left)
            @ (mean * torch.eye(size, dtype=mean.dtype))
            @ nearest_orthogonal(all_right)
        )

    return by_matrix(base, tuned, merge, scaling_factor)


def wudi(base: Weights, tuned: Sequence[Weights], steps: int, learning_rate: float) -> Weights:
    """By autograd and torch's own Adam, in float32."""

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        vectors = torch.stack(list(deltas)).float()
        merged = vectors.sum(0).requires_grad_()
        optimizer = torch.optim.Adam([merged], lr=learning_rate)
        for _ in range(steps):
            loss = sum(((merged - v) @ v.T).square().sum() / v.square().sum() for v in vectors)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
        return merged.detach()

    return by_matrix(base, tuned, merge)


def doge_ta(
    base: Weights, tuned: Sequence[Weights], matrices: Sequence[str], scaling_factor: float, density: float,
    subspace_divisor: int, steps: int, learning_rate: float,
) -> Weights:  # fmt: skip
    """By autograd and torch's own Adam, in float32; only the named tensors change."""
    result = dict(floats(base))
    deltas = {name: torch.stack([model[name] - base[name] for model in tuned]) for name in matrices}
    whole = torch.cat([each.reshape(len(tuned), -1) for each in deltas.values()], dim=1).abs()
    keep = int(whole.shape[1] * density)
    least = whole.sort(dim=1, descending=True).values[:, keep - 1]
    for name, vectors in deltas.items():
        size, tasks = min(vectors.shape[1:]), len(tuned)
        scales = scaling_factor / vectors.flatten(1).norm(dim=1)
        leading = torch.cat([svd(v.double())[0][:, : max(1, size // tasks)] for v in vectors], dim=1)
        common = svd(leading)[0][:, : size // subspace_divisor].float()
        correction = torch.zeros_like(base[name]).requires_grad_()
        optimizer = torch.optim.Adam([correction], lr=learning_rate)
        summed = (scales.view(-1, 1, 1) * vectors).sum(0)
        for _ in range(steps):
            loss = sum((v * (v - summed - scales.sum() * correction)).sum(1).square().sum() for v in vectors)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            assert correction.grad is not None
            correction.grad -= common @ common.T @ correction.grad
            optimizer.step()
        masks = vectors.abs() >= least.view(-1, 1, 1)
        kept = (vectors + correction.detach()) * masks
        result[name] = base[name] + (scales.view(-1, 1, 1) * kept).sum(0)
    return result


def ace_merging(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, ridge: float, heterogeneity: float,
    spectral_share: float,
) -> Weights:  # fmt: skip
    """As the authors' program computes it."""

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        tasks, inputs = len(deltas), deltas[0].shape[1]
        identity = torch.eye(inputs, dtype=torch.float64)
        squares = torch.stack([torch.trace(d.T @ d) for d in deltas])
        logs = torch.log(squares + 1e-12)
        refine = tasks > 1 and bool(logs.var() / (logs.mean() ** 2 + 1e-12) > heterogeneity)
        centred = [d - d.mean(0, keepdim=True) for d in deltas]
        traces = [torch.trace(d.T @ d) + 1e-12 if refine else torch.tensor(1.0).double() for d in centred]
        bare = [d.T @ d / trace for d, trace in zip(centred, traces, strict=True)]
        ridged = [c + ridge / trace * identity for c, trace in zip(bare, traces, strict=True)]
        shared = sum(bare).mean(0, keepdim=True)  # type: ignore[union-attr]
        if refine:
            shared = shared / (squares.mean() + 1e-12)
        merged = sum(d @ c for d, c in zip(centred, ridged, strict=True)) @ torch.linalg.inv(
            sum(ridged) + shared
        )
        if refine:
            away = sum(d @ (c - sum(ridged) / tasks) for d, c in zip(deltas, bare, strict=True))
            left, values, right = svd(away + merged)
            k = int(len(values) * spectral_share)
            if k:
                merged = merged + values[:k].mean() * left[:, :k] @ right[:k]
        return merged

    return by_matrix(base, tuned, merge, scaling_factor)


def svc(base: Weights, tuned: Sequence[Weights], merged: Weights, alpha: float) -> Weights:
    result = {}
    for name, value in floats(base).items():
        if value.dim() != 2 or not value.numel() or "position" in name:
            result[name] = merged[name]
            continue
        difference = merged[name].double() - value.double()
        deltas = [model[name].double() - value.double() for model in tuned]
        left, values, right = svd(difference)
        for r in range(len(values)):
            own = left[:, r] @ difference
            overlaps = []
            for delta in deltas:
                other = left[:, r] @ delta
                overlaps.append(max(alpha, float(own @ other) / max(float(other @ other), 1e-12)))
            values[r] *= len(deltas) / sum(overlaps)
        result[name] = (value + left @ torch.diag(values) @ right).float()
    return result
