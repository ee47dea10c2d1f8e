from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.formats.info import info
from mergecli.formats.opening import open_source
from mergecli.merging.merge import merge
from mergecli.merging.quantize import Loss
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError
from mergecli.storage.sources import parse_source
from tests.conftest import World


def tower(path: Path, task: str) -> dict[str, Tensor]:
    with open_source(parse_source(f"{path}#{task}", Path())) as opened:
        return {name: opened.read(name) for name in opened.entries}


@pytest.mark.parametrize("method", ["emr", "tall_mask", "tsv_c"])
def test_what_a_mixture_holds_for_its_tasks_is_quantized(world: World, method: str) -> None:
    whole, small = world.folder / "whole.safetensors", world.folder / "small.safetensors"
    merge(world.files, base=world.base_file, method=method, output=whole)
    assert taskvector(whole, output=small, quantize=4) == (small,)
    before, after = load_file(whole), load_file(small)
    assert all(
        each.equal(before[name]) for name, each in after.items() if name in before and name != "rescalers"
    )
    assert {name.rpartition(".")[0] for name in after.keys() - before.keys()} <= {
        "unified.zz.long",
        "summed.zz.long",
        "deltas.zz.long",
    }
    for task in world.tuned:
        want, got = tower(whole, task), tower(small, task)
        change = want["zz.long"] - world.base["zz.long"]
        assert 0 < float((got["zz.long"] - want["zz.long"]).norm() / change.norm()) < 0.2
        # small tensors are not quantized; rescalers of EMR differ a little
        torch.testing.assert_close(
            got["layer.0.weight"], want["layer.0.weight"], rtol=0, atol=1e-3 if method == "emr" else 0
        )
    facts = info(small)
    assert facts.quantized["bits"] == "4 an entry, a step for each row"
    assert facts.size < info(whole).size
    assert float(facts.mixture["relative size"].split()[0]) < float(
        info(whole).mixture["relative size"].split()[0]
    )
    with pytest.raises(InputError, match=r"small.safetensors: .* is quantized to 4 bits already"):
        taskvector(small, output=world.folder / "x.safetensors", quantize=8)


def test_the_rescalers_of_emr_fit_what_is_left_of_its_task_vector(world: World) -> None:
    whole, small = world.folder / "whole.safetensors", world.folder / "small.safetensors"
    merge(world.files, base=world.base_file, method="emr", output=whole)
    taskvector(whole, output=small, quantize=2)

    def masked(path: Path, task: str) -> float:
        """The sum over the tensors of the mean of |r_t m_t tau|."""
        return sum(
            float((each - world.base[name]).abs().mean())
            for name, each in tower(path, task).items()
            if each.is_floating_point() and each.numel()
        )

    for task in world.tuned:
        assert masked(small, task) == pytest.approx(masked(whole, task), rel=1e-4)


def test_a_loss_is_a_share_of_the_norm_and_of_zeros_none() -> None:
    delta, kept = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    loss = Loss.of(delta, kept)
    assert (loss.error, loss.largest) == (0.2, 1.0)
    assert loss.metadata() == {"error": "2.000000e-01", "largest_error": "1.000000e+00"}
    assert Loss.of(torch.zeros(3), torch.zeros(3)).error == Loss.of(torch.empty(0), torch.empty(0)).error == 0
    more = loss + Loss.of(torch.tensor([0.0]), torch.tensor([2.0]))
    assert (more.error, more.largest) == ((5 / 25) ** 0.5, 2.0)
