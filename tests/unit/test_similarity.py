from __future__ import annotations

import csv
import io

import pytest
import torch

from mergecli.errors import UsageError
from mergecli.similarity import cos_sim
from mergecli.vectors import taskvector
from tests.conftest import World
from tests.golden import naive
from tests.golden.bench import with_models


def test_cosines_equal_those_of_whole_vectors_in_float64(world: World) -> None:
    vectors = torch.stack(
        [naive.flat(model) - naive.flat(world.base) for model in world.tuned.values()]
    ).double()
    want = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    got = cos_sim(world.files, base=world.base_file)
    torch.testing.assert_close(torch.tensor(got.cosines, dtype=torch.float64), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        torch.tensor(got.norms, dtype=torch.float64), vectors.norm(dim=1), atol=0, rtol=1e-12
    )


def test_task_vector_files_need_no_base_and_give_the_same(world: World) -> None:
    files = {
        name: taskvector(file, base=world.base_file, output=world.folder / f"v/{name}.safetensors")[0]
        for name, file in world.files.items()
    }
    assert cos_sim(files) == cos_sim(world.files, base=world.base_file)
    with pytest.raises(UsageError, match=r"there is no base, and `t1` is not a task vector"):
        cos_sim(world.files)


def test_a_zero_vector_is_similar_to_nothing_but_itself(world: World) -> None:
    other = with_models(world, world.base, world.base, world.tuned["t1"])
    assert cos_sim(other.files, base=other.base_file).cosines == ((1.0, 0.0), (0.0, 1.0))


def test_opposite_and_equal_vectors_have_minus_one_and_one(world: World) -> None:
    opposite = {
        k: 2 * world.base[k] - v if v.is_floating_point() else v for k, v in world.tuned["t1"].items()
    }
    other = with_models(world, world.base, world.tuned["t1"], opposite, world.tuned["t1"])
    (first, *_) = cos_sim(other.files, base=other.base_file).cosines
    assert first == pytest.approx((1, -1, 1), abs=1e-5)


def test_the_csv_has_names_as_header_and_first_column_and_every_digit(world: World) -> None:
    got = cos_sim(world.files, base=world.base_file, output=world.folder / "c.csv")
    rows = list(csv.reader(io.StringIO((world.folder / "c.csv").read_text())))
    assert rows[0] == ["", "t1", "t2", "t3"]
    assert [row[0] for row in rows[1:]] == ["t1", "t2", "t3"]
    assert tuple(tuple(map(float, row[1:])) for row in rows[1:]) == got.cosines
