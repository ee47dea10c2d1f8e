"""Features: the class token after each layer of a vision tower, saved while the tower classifies."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import about
from mergecli.storage.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.images import TaskImages
    from mergecli.evaluation.settings import Tower


class LayerFeatures:
    """A safetensors file with `layer_00`, `layer_01`, ...: (N, D) float32, the class token after each layer of the
    encoder; `labels` (N,); and `index` (N,), the images' numbers in the split. The file appears when it is complete."""

    def __init__(
        self,
        clip: Clip,
        path: Path,
        labels: Sequence[int],
        numbers: Sequence[int],
        metadata: Mapping[str, str],
    ) -> None:
        import torch

        tower: Any = clip.tower
        self._layers: list[Any] = list(tower.encoder.layers)
        self._width = int(clip.model.config.vision_config.hidden_size)
        self._columns = {"labels": torch.tensor(labels), "index": torch.tensor(numbers)}
        layout = {_name(number): ("F32", (len(labels), self._width)) for number in range(len(self._layers))}
        columns = {name: ("I64", (len(labels),)) for name in self._columns}
        self._writer = SafetensorsWriter(path, {**layout, **columns}, metadata)

    def __enter__(self) -> LayerFeatures:
        self._writer.__enter__()
        for name, values in self._columns.items():
            self._writer.write(name, values)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._writer.__exit__(kind, error, trace)

    @contextmanager
    def of_images_from(self, first: int) -> Generator[None]:
        """Saves what passes through the tower inside the block: the images from number `first` on, in one micro-batch or in
        several. Nothing is written if the block fails, so that it can be tried again with smaller ones."""
        import torch

        found: dict[str, list[Tensor]] = {_name(number): [] for number in range(len(self._layers))}

        def take(number: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                found[_name(number)].append(states[:, 0].float().cpu())

            return hook

        with ExitStack() as hooks:
            for number, layer in enumerate(self._layers):
                hooks.enter_context(layer.register_forward_hook(take(number)))
            yield
        for name, states in found.items():
            self._writer.write(name, torch.cat(states), first * self._width)


def feature_size(clip: Clip, images: int) -> int:
    """Bytes of the file of so many images."""
    config = clip.model.config.vision_config
    return images * (4 * config.num_hidden_layers * config.hidden_size + 2 * 8)


def feature_file(folder: Path | None, tower: str, task: str, several: bool) -> Path | None:
    """The file for one tower's features on one task; each of several towers has its own folder."""
    if folder is None:
        return None
    return (folder / tower if several else folder) / f"{task}.safetensors"


def features_metadata(tower: Tower, of_task: TaskImages, key: str) -> dict[str, str]:
    """The metadata of a tower's features on a task's images; `key` is a digest of all that they depend on."""
    images = of_task.images
    inputs = {tower.name: tower.checkpoint.digest(), "data": images.fingerprint}
    return about(
        "features", inputs=inputs, task=of_task.task.name, split=images.split, token="class", evaluation=key
    )


def saved_with(path: Path, key: str) -> bool:
    """Whether the file is there, whole, and was made by the evaluation that the digest `key` stands for."""
    try:
        with open_checkpoint(path) as stored:
            return stored.metadata.get("evaluation") == key
    except InputError:
        return False


def _name(layer: int) -> str:
    return f"layer_{layer:02}"
