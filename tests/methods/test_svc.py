"""Singular value calibration on top of other methods."""

from __future__ import annotations

import pytest

from tests.conftest import World, assert_same
from tests.methods.reference.svc import svc
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.layered_world import MATRICES
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize(
    ("of", "alpha"),
    [("task_arithmetic", 0.1), ("iso_c", 0.1), ("tsv_m", 1.0), ("average", 0.1), ("ties", 0.1)],
)
def test_svc_equals_the_calibration_vector_by_vector_of_what_a_method_merges(
    layered: World, of: str, alpha: float
) -> None:
    want = svc(layered.base, list(layered.tuned.values()), merged(layered, of), alpha)
    got = merged(layered, "svc", of={"name": of}, least_overlap=alpha)
    assert_same(got, with_integers(want, layered), atol=2e-6)


def test_svc_undoes_the_scale_of_one_task_and_of_repeated_ones(layered: World) -> None:
    """Where all tasks are one, u^T D / u^T tau is the scale itself, and is divided out."""
    one = layered.tuned["t1"]
    for count in (1, 3):
        same = with_models(layered, layered.base, *[one] * count)
        got = merged(same, "svc", of={"name": "task_arithmetic", "scaling_factor": 0.7})
        assert_same({n: got[n] for n in MATRICES}, {n: one[n] for n in MATRICES}, atol=2e-6)


def test_svc_leaves_what_is_no_matrix_as_it_was_merged(layered: World) -> None:
    got = merged(layered, "svc")
    inner = task_arithmetic(layered.base, list(layered.tuned.values()), 0.3)
    others = [name for name in inner if name not in MATRICES]
    assert_same({n: got[n] for n in others}, {n: inner[n] for n in others}, atol=1e-6)
