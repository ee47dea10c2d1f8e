"""Memory hardly depends on number, size and dtype of the models: max RSS of real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

MODELS = 8
WIDTH = 768
SHAPES = {
    "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 32, 32),
    "vision_model.embeddings.position_embedding.weight": (50, WIDTH),
    **{
        f"vision_model.encoder.layers.{layer}.{name}": shape
        for layer in range(12)
        for name, shape in (
            *((f"self_attn.{part}_proj.weight", (WIDTH, WIDTH)) for part in ("k", "v", "q", "out")),
            ("mlp.fc1.weight", (4 * WIDTH, WIDTH)),
            ("mlp.fc2.weight", (WIDTH, 4 * WIDTH)),
            ("layer_norm1.weight", (WIDTH,)),
        )
    },
}
"""Nearly all entries of a ViT-B/32."""

MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "mergecli", "merge", *sys.argv[1:]])
_, status, used = os.wait4(process.pid, 0)
print(used.ru_maxrss // 1024)
sys.exit(status != 0)
"""
"""Starts a merge and prints its max RSS in MiB; small itself, because a process counts its parent's memory as its own."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and eight models in bfloat16, so near to it that many differences are equal."""
    folder = tmp_path_factory.mktemp("models")
    files = [folder / f"{name}.safetensors" for name in ("base", *(f"t{i}" for i in range(MODELS)))]
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for number, file in enumerate(files):
        step = 1e-3 if number else 0.0
        near = {k: v + step * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        save_file({name: each.bfloat16() for name, each in near.items()}, file)
    return files


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("ties", 400),
        ("ties --set method.trim=tensor", 400),
        ("della", 400),
        ("consensus", 400),
        ("breadcrumbs", 400),
        ("pcb", 600),
        ("emr", 400),
        ("tall_mask", 400),
    ],
)
def test_eight_models_in_half_precision_take_little_memory(
    models: list[Path], tmp_path: Path, method: str, most: int
) -> None:
    base, *tuned = map(str, models)
    command = ["--base", base, *tuned, "--method", *method.split(), "-o", str(tmp_path / "m.safetensors")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) <= most


@pytest.mark.parametrize("method", ["average", "ties", "tsv_m"])
def test_a_dry_run_expects_the_memory_that_the_merge_takes_within_a_factor_of_one_and_a_half(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    base, *tuned = map(str, models)
    command = ["--base", base, *tuned, "--method", method, "-o", str(tmp_path / "m.safetensors")]
    program = [sys.executable, "-m", "mergecli", "merge", *command, "--dry-run", "--json"]
    planned = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    real = int(done.stdout.splitlines()[-1]) << 20
    assert planned["memory"] / 1.5 < real < planned["memory"] * 1.5
