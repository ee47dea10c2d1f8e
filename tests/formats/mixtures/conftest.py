"""A tiny CLIP, three towers and their tasks, a recipe, and a mixture of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergecli
from tests.support.mixture_scores import LEARNED, ROUTED, TASKS, TOLD
from tests.support.tiny_clip import make_image_task, make_tiny_clip


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, three towers and their tasks, a recipe, and a mixture of each kind."""
    folder = tmp_path_factory.mktemp("mixtures")
    make_tiny_clip(folder / "clip")
    whole = load_file(folder / "clip" / "model.safetensors")
    base = {name: each for name, each in whole.items() if name.startswith("vision_model.")}
    for number, task in enumerate(TASKS):
        torch.manual_seed(number)
        tower = {name: each + 0.15 * torch.randn_like(each) for name, each in base.items()}
        save_file(tower, folder / f"{task}.safetensors")
        make_image_task(folder / "images" / task, train=3, test=13, seed=number)
    tables = [f'[tasks.{task}]\ndata = "images/{task}"\ntemplates = ["a {{}} picture"]\n' for task in TASKS]
    tuned = [f'{task} = "{task}.safetensors"\n' for task in TASKS]
    (folder / "r.toml").write_text(f'base = "clip"\n[tuned]\n{"".join(tuned)}{"".join(tables)}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGECLI_HOME", str(folder / "home"))
        for method in (*TOLD, *ROUTED):
            settings = {"steps": 0, "router_spread": 1.0} if method in LEARNED else {}
            output = folder / f"{method}.safetensors"
            mergecli.merge(folder / "r.toml", method=method, settings=settings, output=output)
    return folder


@pytest.fixture(autouse=True)
def quiet(own_store: None) -> None:
    """One thread, and an empty store."""
