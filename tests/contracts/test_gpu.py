"""What a GPU computes is what the CPU computes, but for rounding. `make gpu` runs these tests too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergecli
from tests.conftest import World

pytestmark = pytest.mark.gpu

TOYS = {"digits": "toy:digits", "letters": "toy:letters"}


def close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("average", {}), ("task_arithmetic", {}), ("ties", {}), ("breadcrumbs", {}), ("pcb", {}), ("magmax", {}), ("tsv_m", {}),
        ("iso_c", {}), ("wudi", {"steps": 5}), ("karcher", {}),
    ],
)  # fmt: skip
def test_a_merge_is_that_of_the_cpu(world: World, gpu: str, method: str, settings: dict[str, Any]) -> None:
    made: list[dict[str, Tensor]] = []
    for device in ("cpu", gpu):
        output = world.folder / f"{len(made)}.safetensors"
        mergecli.merge(
            world.files, base=world.base_file, method=method, settings=settings, output=output, device=device
        )
        made.append(load_file(output))
    close(made[1], made[0], 1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_evaluation_counts_what_the_cpu_counts(own_store: None, gpu: str, precision: str) -> None:
    cpu, here = (
        mergecli.evaluate(
            "toy:digits", clip="toy:base", tasks="digits,letters", limit=64, device=device, dtype=dtype
        )[0]
        for device, dtype in (("cpu", "float32"), (gpu, precision))
    )
    for name in ("digits", "letters"):
        assert abs(here.tasks[name].correct - cpu.tasks[name].correct) <= (precision != "float32")


Learned = Callable[..., dict[str, Tensor]]


@pytest.fixture
def learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learned:
    """The coefficients of a step of AdaMerging, learned anew: a store would have those of another device."""

    def learn(device: str, **settings: Any) -> dict[str, Tensor]:
        folder = Path(mkdtemp(dir=tmp_path))
        monkeypatch.setenv("MERGECLI_HOME", str(folder / "store"))
        mergecli.merge(
            TOYS, base="toy:base", method="ada_merging", settings={"steps": 1, **settings}, device=device,
            output=folder / "merged.safetensors", save_coefficients=folder / "coefficients.safetensors",
        )  # fmt: skip
        return load_file(folder / "coefficients.safetensors")

    return learn


def nearly_all_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Adam's first step is the learning rate along the sign of the gradient, which rounding decides where it vanishes."""
    apart = torch.cat([(got[name] - want[name]).abs().flatten() for name in want])
    assert (apart > 1e-5).float().mean() < 0.02


def test_a_step_of_ada_merging_is_that_of_the_cpu(learned: Learned, gpu: str) -> None:
    nearly_all_close(learned(gpu), learned("cpu"))


def test_task_vectors_in_main_memory_give_the_same_coefficients(learned: Learned, gpu: str) -> None:
    nearly_all_close(learned(gpu, vectors_on="cpu"), learned(gpu))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_a_training_loses_what_the_cpu_does(
    own_store: None, tmp_path: Path, gpu: str, precision: str, tolerance: float
) -> None:
    losses: list[float] = []
    for device, computed in (("cpu", "float32"), (gpu, precision)):
        trace = tmp_path / f"{len(losses)}.csv"
        mergecli.finetune(
            base="toy:base", task="digits", steps=3, learning_rate=1e-4, precision=computed, device=device, trace=trace,
            output=trace.with_suffix(".safetensors"),
        )  # fmt: skip
        losses.append(float(trace.read_text().splitlines()[-1].split(",")[1]))
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
