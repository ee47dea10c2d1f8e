"""EMR-Merging."""

from __future__ import annotations

import pytest
import torch

from mergecli import methods
from mergecli.methods._bitmasks import unpack
from tests.methods.reference._weights import floats
from tests.methods.reference.emr import emr
from tests.support.mixture_files import BASE, TUNED, all_same, towers, written


def test_emr_equals_the_towers_of_whole_models() -> None:
    all_same(towers("emr", BASE, TUNED), emr(BASE, TUNED), atol=1e-6)


def test_emr_of_one_task_is_that_tasks_tower() -> None:
    method = methods.create("emr", {})
    assert written(method, BASE, TUNED[:1])["rescalers"].tolist() == [1.0]
    all_same(towers("emr", BASE, TUNED[:1]), [floats(TUNED[0])], atol=1e-6)


def test_emr_by_hand() -> None:
    base = {"w": torch.zeros(4)}
    tuned = [{"w": torch.tensor([1.0, -2, 0, 3])}, {"w": torch.tensor([2.0, 1, 0, -3])}]
    file = written(methods.create("emr", {}), base, tuned)
    assert file["unified.w"].tolist() == [2, -2, 0, -3]  # of 3 and -3 that cancel, the negative one
    assert unpack(file["masks.w"], 4).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    assert file["rescalers"].tolist() == pytest.approx([6 / 4, 6 / 5])
    assert towers("emr", base, tuned)[0]["w"].tolist() == [3, -3, 0, 0]


def test_emr_of_a_task_with_no_sign_of_its_own_gives_the_base() -> None:
    base, far = {"w": torch.zeros(3)}, {"w": torch.full((3,), 5.0)}
    got = towers("emr", base, [far, {"w": -torch.ones(3)}, base])
    all_same(got, [far, base, base])
