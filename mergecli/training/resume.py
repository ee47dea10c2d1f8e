"""The state of a training and its resume file: weights, Adam's moments, best and last finite weights, losses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.runtime.distributed import Ranks, is_first
from mergecli.runtime.dry_run import is_dry
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, listed, toml_text
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import about, table_differences

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
COUNTERS = ("step", "updates", "best_step", "scale", "growth")


def state_file(output: Path) -> Path:
    """The resume file beside `output`."""
    return output.with_name(f".{output.name.removesuffix('.safetensors')}.resume.safetensors")


def state_size(entries: int, *, validates: bool) -> int:
    """Bytes of the resume file of so many trained entries: weights, two moments and, where there are validations, the best
    weights."""
    return 4 * entries * (1 + len(MOMENTS) + validates)


@dataclass(frozen=True)
class StoredState:
    """The content of a resume file."""

    counters: Mapping[str, float]
    tensors: Mapping[str, Tensor]


def read_state(
    path: Path, work: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], tasks: int
) -> StoredState | None:
    """The content of the file; None if there is no file, or it is damaged, which is a warning.

    Args:
        work: what the training depends on: settings, base and images.

    Raises:
        UsageError: it is the state of other work; every difference is listed.
    """
    if not path.exists():
        return None
    try:
        with open_checkpoint(path, checked=True) as stored:
            known: Any = json.loads(stored.metadata["work"])
            differing = [
                f"`{key}`: {_text(before)} -> {_text(after)}"
                for key, before, after in table_differences(known, json.loads(json.dumps(work)))
            ]
            counters: dict[str, float] = {}
            tensors: dict[str, Tensor] = {}
            if not differing:
                recorded: Any = json.loads(stored.metadata["facts"])
                counters = {name: float(recorded[name]) for name in COUNTERS}
                parts = ["weights", *MOMENTS, *(["best"] if counters["best_step"] else [])]
                names = [f"{part}.{name}" for part in parts for name in parameters]
                tensors = {name: stored.read(name) for name in [*names, "losses", "validation"]}
                _check_state(counters, tensors, parameters, tasks)
    except (InputError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        text = f"{path}: is damaged, or of another version: training starts again"
        warnings.warn(text, MergecliWarning, stacklevel=2)
        return None
    if differing:
        raise UsageError(
            f"{path}: is the state of a training with other settings, base or images:\n{listed(differing, 10)}",
            "give the same ones to resume it, or `--fresh` (`fresh=True`) to start again",
        )
    return StoredState(counters, tensors)


def _check_state(
    counters: Mapping[str, float],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tasks: int,
) -> None:
    """Raises ValueError unless shapes and values are those of a state."""
    validations = tensors["validation"]
    is_valid = all(
        each.shape == parameters[name.partition(".")[2]].shape
        for name, each in tensors.items()
        if name not in ("losses", "validation")
    )
    is_valid &= tensors["losses"].shape == (int(counters["step"]), tasks)
    is_valid &= validations.dim() == 2 and validations.shape[1] == 1 + tasks
    is_valid &= all(bool(each.isfinite().all()) for each in tensors.values())
    is_valid &= counters["best_step"] in {0.0, *validations.flatten()[:: tasks + 1].tolist()}
    if not is_valid:
        raise ValueError("not a state")


def _text(value: object) -> str:
    return "none" if value is None else toml_text(value)


class TrainingState:
    """Trained weights, Adam's moments, the best weights so far, and the losses of each step.

    Adam counts its own `updates`. They are fewer than the steps if float16 overflowed and steps were skipped.
    """

    def __init__(
        self,
        output: Path,
        parameters: Mapping[str, nn.Parameter],
        work: Mapping[str, Any],
        tasks: int,
        ranks: Ranks,
        *,
        fresh: bool = False,
    ) -> None:
        """Resumes from the file beside the output if there is one; `fresh` deletes it first.

        Raises:
            UsageError: the file is the state of other `work`.
        """
        import torch

        self.output = output
        self.path = state_file(output)
        self.parameters = parameters
        self.tasks = tasks
        self.losses: list[list[float]] = []
        """(steps, T)"""
        self.validation: dict[int, list[float]] = {}
        """Step -> (T,) accuracies."""
        self.best_step = 0
        self.best: dict[str, Tensor] = {}
        """Its weights; only in the first process."""
        self.finite_step: int | None = None
        """The last step whose weights are known to have finite losses."""
        self.finite: dict[str, Tensor] = {}
        """Its weights, from step 1 on; only in the first process, and only while there are no best weights."""
        self.saved = (0, 0)
        """Numbers of steps and validations in the file."""
        self.between_steps = True
        """False while a step is being made, when weights and moments do not fit together."""
        self.optimizer: Optimizer = torch.optim.Adam(
            parameters.values(),
            lr=work["learning_rate"],
            eps=work.get("epsilon", 1e-8),
            weight_decay=work["weight_decay"],
        )
        self.device = next(iter(parameters.values())).device
        # scales the loss so that float16 can hold the gradients; disabled for other precisions
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=work.get("precision") == "float16")
        if self.scaler.is_enabled():
            self.scaler.scale(
                torch.zeros((), device=self.device)
            )  # initializes it: a process may have no image of the first step
        self.work = work
        if fresh and is_first() and not is_dry():
            self.path.unlink(missing_ok=True)
        if not (fresh and is_dry()):
            self._load(ranks)

    @property
    def step(self) -> int:
        """The number of steps made."""
        return len(self.losses)

    def record_validation(self, accuracies: list[float]) -> None:
        """Records (T,) accuracies of the current weights; of equal means the earlier weights stay the best."""
        self.validation[self.step] = accuracies
        if not self.best_step or sum(accuracies) > sum(self.validation[self.best_step]):
            self.best_step = self.step
            if is_first():
                self.best = {name: each.detach().cpu().clone() for name, each in self.parameters.items()}

    def record_finite(self) -> None:
        """Records that the current weights have finite losses; copies them unless there are best weights."""
        import torch

        self.finite_step = self.step
        if not is_first() or self.best_step or not self.step:
            self.finite = {}
            return
        if not self.finite:
            self.finite = {name: torch.empty_like(each) for name, each in self.parameters.items()}
        with torch.no_grad():
            for name, each in self.parameters.items():
                self.finite[name].copy_(each)

    def restore_best(self) -> None:
        """Replaces the current weights by the best ones."""
        self._load_weights(self.best)

    def restore_last_good(self) -> int:
        """Replaces the current weights by the best ones, else by the last ones with finite losses; returns their step, 0 if
        there are none or they are untrained."""
        self._load_weights(self.best or self.finite)
        return self.best_step or self.finite_step or 0

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, each in weights.items():
                self.parameters[name].copy_(each)

    def save(self) -> None:
        """Writes the state, if there is something new, whole and finite; the one before is replaced when it stands."""
        import torch

        from mergecli.storage.safetensors_writer import save_tensors

        is_new = self.step and self.saved != (self.step, len(self.validation))
        if not (is_first() and self.between_steps and is_new):
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach().cpu()
            for part, key in MOMENTS.items():
                moment = self.optimizer.state[parameter].get(key)
                tensors[f"{part}.{name}"] = torch.zeros_like(parameter) if moment is None else moment
        tensors |= {f"best.{name}": best for name, best in self.best.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64).view(-1, self.tasks)
        tensors["validation"] = self._validation()
        if not all(bool(each.isfinite().all()) for each in tensors.values()):
            return  # the last good state stays
        facts = json.dumps(self._counters())
        written = about("training state", work=json.dumps(self.work), facts=facts)
        save_tensors(
            {name: each.cpu().contiguous() for name, each in tensors.items()},
            self.path,
            written,
            checked=True,
        )
        self._mark_saved()

    def _mark_saved(self) -> None:
        self.saved = (self.step, len(self.validation))

    def _validation(self) -> Tensor:
        """(validations, 1 + T): steps and accuracies."""
        import torch

        rows = [[step, *accuracies] for step, accuracies in self.validation.items()]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 1 + self.tasks)

    def _counters(self) -> dict[str, float]:
        first = next(iter(self.parameters.values()))
        updates = float(self.optimizer.state[first].get("step", 0)) if first in self.optimizer.state else 0.0
        scaling: dict[str, Any] = self.scaler.state_dict()
        values = (
            self.step,
            updates,
            self.best_step,
            scaling.get("scale", 0),
            scaling.get("_growth_tracker", 0),
        )
        return dict(zip(COUNTERS, map(float, values), strict=True))

    def _load(self, ranks: Ranks) -> None:
        """Loads the file in the first process and sends its content to all others; all raise its error, if it has one."""
        import torch

        found: StoredState | None = None
        refusal: UsageError | None = None
        if is_first():
            try:
                found = read_state(self.path, self.work, self.parameters, self.tasks)
            except UsageError as error:
                refusal = error
        ranks.raise_first_error(refusal, self.device)
        own = [*found.counters.values()] if found else [0.0] * len(COUNTERS)
        sent = ranks.broadcast(torch.tensor(own, dtype=torch.float64, device=self.device))
        counters = dict(zip(COUNTERS, sent.tolist(), strict=True))
        if not counters["step"]:
            return
        rows = torch.tensor([len(found.tensors["validation"]) if found else 0], device=self.device)
        shapes = {
            "losses": (int(counters["step"]), self.tasks),
            "validation": (int(ranks.broadcast(rows)), 1 + self.tasks),
        }

        def everywhere(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            own = torch.zeros(shape, dtype=dtype) if found is None else found.tensors[name]
            return ranks.broadcast(own.to(self.device, dtype).contiguous())

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                shape, dtype = tuple(parameter.shape), parameter.dtype
                parameter.copy_(everywhere(f"weights.{name}", shape, dtype))
                if counters["updates"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(counters["updates"], dtype=torch.float32),
                        **{key: everywhere(f"{part}.{name}", shape, dtype) for part, key in MOMENTS.items()},
                    }
        self.losses = everywhere("losses", shapes["losses"], torch.float64).tolist()
        measured: list[list[float]] = everywhere("validation", shapes["validation"], torch.float64).tolist()
        self.validation = {int(row[0]): row[1:] for row in measured}
        self.best_step = int(counters["best_step"])
        if found and self.best_step:
            self.best = {name: found.tensors[f"best.{name}"] for name in self.parameters}
        if self.scaler.is_enabled():
            scaling: dict[str, Any] = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {**scaling, "scale": counters["scale"], "_growth_tracker": int(counters["growth"])}
            )
        self._mark_saved()
