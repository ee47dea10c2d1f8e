"""Both hubs with the same tiny repositories, an empty store, and an environment that knows nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mergecli.hub.retry import RetryPolicy
from tests.conftest import random_weights
from tests.hub.servers import HuggingFaceServer, ModelScopeServer, Repository


def model(seed: int) -> dict[str, bytes]:
    """The files of a model as repositories have them: what is used, and what never is."""
    return {
        "README.md": b"# a model\n",
        "config.json": b'{"model_type": "clip_vision_model"}\n',
        "model.safetensors": save(random_weights(seed)),
        "preprocessor_config.json": b"{}\n",
        "pytorch_model.bin": b"never asked for",
        "tf_model.h5": b"never asked for",
        "onnx/model.safetensors": b"never asked for",
        "vocab.json": b"{}\n",
    }


USED = ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"]


def pickled(seed: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(random_weights(seed), buffer)
    return buffer.getvalue()


def parquet(*names: str) -> dict[str, bytes]:
    """Files of that name; what is in them does not matter here."""
    return {name: f"rows of {name}".encode() for name in names}


REPOSITORIES = {
    "org/base": model(0),
    "org/tuned": model(1),
    "datasets/org/birds": {
        "README.md": b"# birds\n",
        **parquet(
            "data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet", "data/extra-00000-of-00001.parquet",
        ),
    },
}  # fmt: skip

RECIPE = """schema = 1
base = "hf:org/base"

[tuned]
birds = "hf:org/tuned"

[tasks.birds]
data = "hf:org/birds"
classes = ["robin", "wren"]
templates = ["a photo of a {}."]
"""


@dataclass(frozen=True)
class Hubs:
    """The servers, and what a process needs to be told of them and of the store."""

    hf: HuggingFaceServer
    ms: ModelScopeServer
    store: Path
    environment: Mapping[str, str]

    @property
    def asked(self) -> list[str]:
        """Everything that any server was asked for."""
        every = (*self.hf.requests, *self.hf.cdn_requests, *self.ms.requests, *self.ms.cdn_requests)
        return [request.path for request in every]

    def forget(self) -> None:
        self.hf.forget()
        self.ms.forget()


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hubs]:
    """Both hubs; this process and those it starts know no others."""
    with (
        HuggingFaceServer({name: Repository(files) for name, files in REPOSITORIES.items()}) as hf,
        ModelScopeServer({name: Repository(files, "master") for name, files in REPOSITORIES.items()}) as ms,
    ):
        store = tmp_path / "store"
        environment = {
            **hf.environment, **ms.environment, "MERGECLI_HOME": str(store),
            "HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_HOME": str(tmp_path / "ms"), "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # pauses between tries are short in this process; those that tests start are as patient as ever
        for verb in ("fetch", "push"):
            monkeypatch.setattr(f"mergecli.hub.{verb}.RetryPolicy", partial(RetryPolicy, first=0.02))
        yield Hubs(hf, ms, store, environment)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of a base, a model and a data set of the hubs."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path
