from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergecli.merging.cos_sim import cos_sim
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import MergecliWarning, UsageError
from tests.conftest import World
from tests.methods.reference._weights import flat
from tests.support.merging import with_models


def test_cosines_equal_those_of_whole_vectors_in_float64(world: World) -> None:
    vectors = torch.stack([flat(model) - flat(world.base) for model in world.tuned.values()]).double()
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


def test_a_zero_vector_is_similar_to_nothing_but_itself_and_said(world: World) -> None:
    other = with_models(world, world.base, world.base, world.tuned["t1"])
    with pytest.warns(MergecliWarning, match=r"^`t1` has the weights of the base: its task vector is zero"):
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


def test_every_layer_has_its_own_cosines(tmp_path: Path) -> None:
    names = [
        "embeddings.x",
        "encoder.layers.0.a",
        "encoder.layers.0.b",
        "encoder.layers.10.a",
        "post_layernorm.weight",
    ]
    models = [{name: torch.randn(50) for name in names} for _ in range(3)]
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"{number}.safetensors")
    got = cos_sim(
        {"a": tmp_path / "1.safetensors", "b": tmp_path / "2.safetensors"}, base=tmp_path / "0.safetensors",
        layers=tmp_path / "layers.csv",
    )  # fmt: skip
    assert list(got.layers) == ["before", "0", "10", "after"]
    deltas = [
        torch.cat([model[name] - models[0][name] for name in names[1:3]]).double() for model in models[1:]
    ]
    assert got.layers["0"][0][1] == pytest.approx(float(torch.cosine_similarity(*deltas, dim=0)), abs=1e-12)
    rows = list(csv.reader((tmp_path / "layers.csv").read_text().splitlines()))
    assert rows[0] == ["layer", "first", "second", "cosine"]
    assert [row[:3] for row in rows[1:]] == [[layer, "a", "b"] for layer in ("before", "0", "10", "after")]
