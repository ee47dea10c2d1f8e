"""Task singular vectors, compressed."""

from __future__ import annotations

import pytest
import torch

from mergecli import methods
from tests.methods.reference._weights import floats
from tests.methods.reference.tsv_c import tsv_c
from tests.support.mixture_files import BASE, TUNED, all_same, towers, written


@pytest.mark.parametrize("fraction", [None, 0.1, 0.4, 1.0])
def test_tsv_c_equals_full_decompositions_in_float64(fraction: float | None) -> None:
    settings = {} if fraction is None else {"rank_fraction": fraction}
    got = towers("tsv_c", BASE, TUNED, **settings)
    all_same(got, tsv_c(BASE, TUNED, fraction), atol=1e-6)
    if fraction == 1:
        all_same(got, [floats(model) for model in TUNED], atol=1e-6)


def test_task_vectors_of_low_rank_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"fc.weight": torch.randn(40, 30, generator=generator)}
    factors = [[torch.randn(size, 4, generator=generator) for size in (40, 30)] for _ in range(5)]
    tuned = [{"fc.weight": base["fc.weight"] + 0.1 * left @ right.T} for left, right in factors]
    file = written(methods.create("tsv_c", {}), base, tuned)
    assert file["left.fc.weight"].shape == (5, 40, 6)
    all_same(towers("tsv_c", base, tuned), tuned, atol=1e-5)


def test_a_position_embedding_is_a_matrix_if_it_is_said_to_be() -> None:
    name = "embeddings.position_embedding.weight"
    for setting, key in (("table", f"deltas.{name}"), ("matrix", f"right.{name}")):
        assert key in written(methods.create("tsv_c", {"position_embedding": setting}), BASE, TUNED)
