"""The file that a training writes: a tower or an adapter, at the end or after divergence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.formats.lora_files import base_name
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import is_first
from mergecli.runtime.errors import InputError
from mergecli.storage.metadata import about
from mergecli.storage.sources import Source
from mergecli.training.settings import Settings, last_good_path

if TYPE_CHECKING:
    from mergecli.clip.model import Clip
    from mergecli.training.resume import TrainingState


@dataclass(frozen=True)
class TrainedModel:
    """The CLIP whose tower is trained, and the metadata of its file."""

    clip: Clip
    adapter: Any
    """A `peft.PeftModel` around the tower; None if the tower itself is trained."""
    base: Source
    base_digest: str
    settings: Settings
    trained_on: Mapping[str, Any]
    """Base and tasks, as the file records them."""

    def write(self, path: Path, **more: str) -> None:
        """Writes the current weights; `more` goes into the metadata.

        Raises:
            InputError: the file cannot be written, or a weight does not fit into the dtype.
        """
        import torch

        from mergecli.clip.model import save_tower
        from mergecli.training.lora import save_adapter

        low_rank, dtype = self.settings.low_rank, getattr(torch, self.settings.dtype)
        kind, method = ("adapter", f"finetune {low_rank.option}") if low_rank else ("checkpoint", "finetune")
        metadata = (
            about(kind, method=method, inputs={"base": self.base_digest}, task=self.trained_on["task"]) | more
        )
        metadata["settings"] = json.dumps({**self.settings.as_metadata, **self.trained_on})
        if low_rank is None:
            save_tower(self.clip, path, metadata, dtype)
        else:
            metadata["adapter"] = low_rank.kind
            save_adapter(self.adapter, self.clip, base_name(self.base), path, metadata, dtype)

    def write_last_good(self, state: TrainingState) -> str:
        """After divergence: saves the last finite weights, deletes the resume file, and returns a clause for the error message."""
        path, step = last_good_path(state.output), state.restore_last_good()
        with interrupts.deferred():
            if is_first():
                state.path.unlink(missing_ok=True)  # the same settings would diverge again
            if not step:
                return (
                    f"it was resumed at step {state.step}, and no weights with finite losses are left"
                    if state.step and state.finite_step is None
                    else "nothing was learned yet"
                )
            if is_first():
                try:
                    self.write(path, last_good_step=str(step))
                except InputError as error:
                    return f"the weights of step {step} are lost: {error.message}"
        which = "the best ones" if state.best_step else "the last ones with finite losses"
        return f"the weights of step {step}, {which}, are in {path}"
