"""What a training makes, a tower or an adapter for one, as it is written: at the end, or when numbers are lost."""

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
from mergecli.training.settings import Settings, last_good

if TYPE_CHECKING:
    from mergecli.clip.model import Clip
    from mergecli.training.resume import TrainingState


@dataclass(frozen=True)
class Product:
    """The CLIP whose tower is trained, and what its file says of itself."""

    clip: Clip
    adapter: Any
    """A `peft.PeftModel` around the tower; None if the tower itself is trained."""
    base: Source
    base_digest: str
    settings: Settings
    work: Mapping[str, Any]
    """What was learnt, and on what."""

    def write(self, path: Path, **more: str) -> None:
        """Writes the weights as they are now; `more` is for the metadata.

        Raises:
            InputError: it cannot be written, or the dtype has no numbers for the weights.
        """
        import torch

        from mergecli.clip.model import save_tower
        from mergecli.training.lora import save_adapter

        low_rank, dtype = self.settings.low_rank, getattr(torch, self.settings.dtype)
        kind, method = ("adapter", f"finetune {low_rank.option}") if low_rank else ("checkpoint", "finetune")
        metadata = (
            about(kind, method=method, inputs={"base": self.base_digest}, task=self.work["task"]) | more
        )
        metadata["settings"] = json.dumps({**self.settings.told, **self.work})
        if low_rank is None:
            save_tower(self.clip, path, metadata, dtype)
        else:
            metadata["adapter"] = low_rank.kind
            save_adapter(self.adapter, base_name(self.base), path, metadata, dtype)

    def rescue(self, state: TrainingState) -> str:
        """Writes what is left of a training that lost its numbers, whose state goes; a clause that says what and where."""
        path, step = last_good(state.output), state.take_last_good()
        with interrupts.undisturbed():
            if is_first():
                state.path.unlink(missing_ok=True)  # the same settings would only lose them again
            if not step:
                return (
                    f"no weights that gave numbers are left of what was taken up at step {state.step}"
                    if state.step and state.good_step is None
                    else "nothing was learnt yet"
                )
            if is_first():
                try:
                    self.write(path, last_good_step=str(step))
                except InputError as error:
                    return f"the weights of step {step} are lost: {error.message}"
        which = "the best ones" if state.best_step else "the last ones that gave numbers"
        return f"the weights of step {step}, {which}, are in {path}"
