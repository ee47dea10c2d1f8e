"""What an interrupted fine-tuning needs to go on as if nothing had happened: a safetensors file beside the output."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.provenance import about

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from mergecli.clip.model import Clip

_LOSSES = 100


class TrainingState:
    """Tower, Adam's moments and the step; taken from the file beside the output if that is of the same work."""

    def __init__(self, clip: Clip, output: Path, settings: Mapping[str, Any]) -> None:
        import torch

        name = output.name.removesuffix(".safetensors")
        self.path = output.with_name(f".{name}.resume.safetensors")
        self.settings = settings
        self.step = self.saved = 0
        self.losses: deque[float] = deque(maxlen=_LOSSES)
        self._tower: nn.Module = clip.tower.requires_grad_(True)
        self.optimizer: Optimizer = torch.optim.Adam(
            self._tower.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        self._digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if self.path.is_file():
            self._load()

    def save(self) -> None:
        """Writes the state; the one before is replaced when this one is whole."""
        from mergecli.clip.model import save_tensors

        tensors: dict[str, Tensor] = {}
        for name, parameter in self._tower.named_parameters():
            moments: dict[str, Tensor] = self.optimizer.state[parameter]
            tensors[f"tower.{name}"] = parameter.detach().cpu()
            tensors[f"first.{name}"] = moments["exp_avg"].cpu()
            tensors[f"second.{name}"] = moments["exp_avg_sq"].cpu()
        losses = json.dumps(list(self.losses))
        written = about("training state", digest=self._digest, step=str(self.step), losses=losses)
        save_tensors(tensors, self.path, written)
        self.saved = self.step

    def _load(self) -> None:
        import torch

        from mergecli.checkpoint import open_checkpoint

        with open_checkpoint(self.path) as stored, torch.no_grad():
            if stored.metadata.get("digest") != self._digest:
                return
            self.step = self.saved = int(stored.metadata["step"])
            self.losses.extend(json.loads(stored.metadata["losses"]))
            for name, parameter in self._tower.named_parameters():
                parameter.copy_(stored.read(f"tower.{name}"))
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": stored.read(f"first.{name}").to(parameter.device),
                    "exp_avg_sq": stored.read(f"second.{name}").to(parameter.device),
                }
