"""What the program gives, as digests: recorded before a change that must not change one byte, and compared after it.

    python scripts/same_numbers.py -o tests/numbers/digests.json           record
    python scripts/same_numbers.py --against tests/numbers/digests.json    compare; status 1 where anything differs
    python scripts/same_numbers.py --against FILE --only toys,mistakes     some sections

Only what is public is used: the functions of `mergecli`, and the command line as real processes. Everything lies in a
temporary folder, which is the current one while it works, so that no path shows in what is written. Results are digests of
files (whole, and of the tensors alone), counts, losses, tables and exit statuses. Notes are words of messages, of help and of
documentation: a difference in these is told, and is none that counts. Rounding depends on processor and libraries, so a
record says what it was made with, and is compared with nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import mergecli

PACKAGE = Path(mergecli.__file__).resolve().parent
LIBRARIES = (
    "torch",
    "numpy",
    "transformers",
    "datasets",
    "safetensors",
    "peft",
    "pyarrow",
    "pillow",
    "matplotlib",
)
COMMANDS = (
    "fetch", "taskvector", "merge", "eval", "measure", "cos-sim", "report", "finetune", "extract", "info", "cache",
    "methods", "tasks",
)  # fmt: skip
BASE = "toy:base"
TOYS = {task: f"toy:{task}" for task in ("digits", "shapes", "colours", "faces")}
SEED = 7

Settings = Mapping[str, Any]
Case = tuple[str, Settings]
Tensors = dict[str, torch.Tensor]

BY_ENTRY: dict[str, Case] = {
    "average": ("average", {}),
    "weighted_average": ("weighted_average", {"weights": [0.5, 1.5, 2.0, 0.25]}),
    "weighted_average as given": ("weighted_average", {"weights": [0.1, 0.2, 0.3, 0.5], "normalize": False}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "ties as published": ("ties", {"trim": "fusion_bench", "zero_sign": "majority"}),
    "ties by tensor, mean": ("ties", {"trim": "tensor", "aggregate": "mean", "scaling_factor": 1.0}),
    "ties, max": ("ties", {"aggregate": "max", "density": 0.7}),
    "magmax": ("magmax", {}),
    "breadcrumbs": ("breadcrumbs", {"drop_smallest": 0.6, "drop_largest": 0.05}),
    "della": ("della", {}),
    "della, sum without signs": ("della", {"aggregate": "sum", "elect": False, "window": 0.3}),
    "pcb": ("pcb", {}),
    "consensus": ("consensus", {}),
    "consensus of three": ("consensus", {"agreeing_tasks": 3, "mask_threshold": 0.4}),
    "emr": ("emr", {}),
    "tall_mask": ("tall_mask", {}),
    "dare": ("dare", {"of": {"name": "ties", "density": 0.5}, "drop_rate": 0.3}),
    "dare without rescaling": ("dare", {"rescale": False}),
    "lines": ("lines", {"of": {"name": "ties"}, "first_layer": 0.4, "increase": 0.7}),
}
"""Methods on weights that work entry by entry, or on tensors as long vectors."""
PAIRS: dict[str, Case] = {"linear": ("linear", {"t": 0.3}), "slerp": ("slerp", {"t": 0.3})}
"""Methods that merge two models."""
SPECTRAL: dict[str, Case] = {
    "tsv_m": ("tsv_m", {}),
    "act_mat": ("act_mat", {}),
    "act_mat, half of the entries": ("act_mat", {"density": 0.5}),
    "dc_merge": ("dc_merge", {}),
    "dc_merge, not fused": ("dc_merge", {"fuse_qkv": False, "density": 0.1}),
    "larv": ("larv", {"of": {"name": "iso_c"}}),
    "wudi by ridge": ("wudi", {"solver": "ridge"}),
    "wudi by spectrum": ("wudi", {"solver": "spectral"}),
    "tsv_c": ("tsv_c", {}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "ace_merging": ("ace_merging", {}),
    "wudi": ("wudi", {"steps": 3}),
    "doge_ta": ("doge_ta", {"steps": 3}),
    "svc": ("svc", {"of": {"name": "ties"}}),
    "smile": ("smile", {"rank": 4}),
}
"""Methods on weights that decompose matrices."""
MATRICES: dict[str, Case] = {
    **{
        f"{name}, position embedding as a matrix": (name, {"position_embedding": "matrix"})
        for name in ("tsv_m", "tsv_c", "iso_c", "iso_cts", "ace_merging", "svc")
    },
    "tsv_c, a tenth": ("tsv_c", {"rank_fraction": 0.1}),
    "ace_merging, always refined": ("ace_merging", {"heterogeneity": 0.0}),
    "smile, two experts": ("smile", {"rank": 3, "gate_rank": 2, "experts_per_token": 2, "average_others": True}),
    "svc of iso_c": ("svc", {"of": {"name": "iso_c"}, "least_overlap": 0.5}),
    "lines of dare": ("lines", {"of": {"name": "dare", "of": {"name": "magmax"}}}),
}  # fmt: skip
"""More of these on the toys, where they are fast."""
FEW = {"examples": 10, "batch_size": 4}
SHORT = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}
ROUTED = {**SHORT, "router_spread": 0.1}
LOOKING: dict[str, Case] = {
    "fisher": ("fisher", FEW),
    "fisher, each example": ("fisher", {**FEW, "per_example": True, "shuffle": True, "normalize": False}),
    "reg_mean": ("reg_mean", FEW),
    "reg_mean, first images": ("reg_mean", {**FEW, "shuffle": False, "ridge": 0.1, "exclude": [".*fc1.*"]}),
    "reg_mean_plus_plus": ("reg_mean_plus_plus", FEW),
    "esm": ("esm", FEW),
    "lot": ("lot", FEW),
    "ada_rank": ("ada_rank", {**SHORT, "objective": "experts"}),
    "doge_ada_merging": ("doge_ada_merging", {**SHORT, "correction_steps": 3}),
    "fw_merging": ("fw_merging", {"steps": 2, "batch_size": 4}),
    "pwe_moe": ("pwe_moe", {**SHORT, "preference": [4, 3, 2, 1]}),
    "rank_one_moe": ("rank_one_moe", {**ROUTED, "rank": 4}),
    "ada_merging": ("ada_merging", SHORT),
    "ada_merging by experts": ("ada_merging", {**SHORT, "objective": "experts", "split": "train"}),
    "ada_merging by task": ("ada_merging", {**SHORT, "granularity": "task", "clamp": True, "split": "train"}),
    "ada_merging on ties": ("ada_merging", {**SHORT, "preprocess": "ties", "vectors": "bfloat16"}),
    "ada_merging on two tasks": ("ada_merging", {**SHORT, "adapt_on": ["digits", "faces"], "vectors_on": "cpu"}),
    "concrete_task_arithmetic": ("concrete_task_arithmetic", SHORT),
    "concrete_task_arithmetic, expected": ("concrete_task_arithmetic", {**SHORT, "mask": "expected"}),
    "concrete_ada_merging": ("concrete_ada_merging", {**SHORT, "mask_steps": 2}),
    "concrete_ada_merging as published": (
        "concrete_ada_merging",
        {**SHORT, "mask_steps": 2, "order": "published", "granularity": "task", "mask": "discrete"},
    ),
    "weight_ensembling_moe": ("weight_ensembling_moe", ROUTED),
    "weight_ensembling_moe, each image": (
        "weight_ensembling_moe", {**ROUTED, "router_layers": 1, "train_routing": "sample", "split": "validation"},
    ),
    "efficient_weight_ensembling_moe": ("efficient_weight_ensembling_moe", ROUTED),
    "efficient_weight_ensembling_moe, a router a layer": (
        "efficient_weight_ensembling_moe",
        {**ROUTED, "shared_router": False, "position_encoding": 8, "router_density": 0.5, "density": 0.3},
    ),
}  # fmt: skip
"""Methods that look at images."""


@dataclass
class Record:
    """What was found so far: name -> value."""

    results: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    section: str = ""

    def add(self, name: str, value: Any) -> None:
        """A result: a value, or a table of them, each of which is compared."""
        for key, each in flat(f"{self.section}/{name}", value):
            if key in self.results:
                raise KeyError(f"{key} is there twice")
            self.results[key] = each

    def note(self, name: str, value: Any) -> None:
        """Words, which may change."""
        self.notes |= flat(f"{self.section}/{name}", value)

    def case(self, name: str, make: Callable[[], Any]) -> None:
        """Adds what the function gives. Where it fails, that is the result, and the others go on."""
        try:
            found = make()
        except Exception as error:  # noqa: BLE001  whatever it is, it is to be compared
            self.note(f"{name}: failed", without_places(str(error)))
            found = f"failed: {type(error).__name__}"
            if not isinstance(error, mergecli.MergecliError):
                traceback.print_exc()
            print(f"{self.section}/{name}: {type(error).__name__}: {error}", file=sys.stderr)
        self.add(name, found)

    def to_json(self) -> str:
        """A line for each name, so that versions of the record can be compared."""
        content = {"made_with": made_with(), "results": self.results, "notes": self.notes}
        tables = [
            f"{json.dumps(kind)}: {{\n"
            + ",\n".join(
                f" {json.dumps(name)}: {json.dumps(each, ensure_ascii=False)}" for name, each in table.items()
            )
            + "\n}"
            for kind, table in content.items()
        ]
        return "{\n" + ",\n".join(tables) + "\n}\n"


def flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The value under its name; of a table each part, under both names."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [pair for key, each in value.items() for pair in flat(f"{name}: {key}", each)]


def made_with() -> dict[str, str | None]:
    """What rounding depends on."""
    found: dict[str, str | None] = {"processor": torch.backends.cpu.get_cpu_capability()}
    found |= {"machine": platform.machine(), "python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# ---------------------------------------------------------------- digests


def digest(content: bytes | str) -> str:
    """SHA-256, as much of it as is needed."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:32]


def tensors_digest(content: bytes) -> str:
    """Of names, dtypes, shapes and values in a safetensors file, in the order of names; not of its metadata."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    state, data = hashlib.sha256(), memoryview(content)[8 + size :]
    for name, entry in sorted(header.items()):
        start, end = entry["data_offsets"]
        state.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        state.update(data[start:end])
    return state.hexdigest()[:32]


def kept(path: str | Path) -> Any:
    """Digests of a file, or of all files of a folder."""
    place = Path(path)
    if place.is_dir():
        files = sorted(each for each in place.rglob("*") if each.is_file())
        return {each.relative_to(place).as_posix(): kept(each) for each in files}
    content = place.read_bytes()
    if place.suffix == ".safetensors":
        return {"file": digest(content), "tensors": tensors_digest(content)}
    return digest(content)


def taken(path: str | Path) -> Any:
    """Digests of a file or folder, which is then removed."""
    found = kept(path)
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    return found


def without_places(text: str) -> str:
    """The text without the folders of this machine, and without those inside of the package."""
    for place, word in ((Path.cwd(), "HERE"), (Path.cwd().resolve(), "HERE"), (PACKAGE, "PACKAGE")):
        text = text.replace(str(place), word)
    return re.sub(r"PACKAGE(/[\w.-]+)*(/[\w.-]+)", r"PACKAGE\2", text)


# ---------------------------------------------------------------- inputs


def near(weights: Tensors, seed: int, step: float = 1e-2) -> Tensors:
    """Weights near others."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: each + step * torch.randn(each.shape, generator=generator) for name, each in weights.items()
    }


def tower(layers: int, width: int = 768, patch: int = 8, positions: int = 50) -> Tensors:
    """Random weights in the shapes of layers of a ViT-B/32; embeddings are smaller."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(layers):
        place = f"encoder.layers.{layer}."
        norms += [f"{place}layer_norm1", f"{place}layer_norm2"]
        linear = {f"self_attn.{part}_proj": (width, width) for part in ("k", "v", "q", "out")}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for part, shape in linear.items():
            shapes |= {f"{place}{part}.weight": shape, f"{place}{part}.bias": shape[:1]}
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    generator = torch.Generator().manual_seed(SEED)
    return {
        f"vision_model.{name}": 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def make_towers(folder: str, layers: int, count: int) -> dict[str, str]:
    """Files of a base and of models near it; name -> path of the models."""
    place = Path(folder)
    place.mkdir()
    base = tower(layers)
    save_file(base, place / "base.safetensors")
    models = {f"t{number}": f"{folder}/t{number}.safetensors" for number in range(1, count + 1)}
    for number, path in enumerate(models.values()):
        save_file(near(base, number, 1e-3), path)
    return models


def make_adapter(folder: str, seed: int, rank: int = 4, **more: Any) -> str:
    """A folder with a random LoRA adapter for the toy base, as peft writes it."""
    place = Path(folder)
    place.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj", "fc1"],
        "base_model_name_or_path": None, "bias": "none", **more,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights: Tensors = {}
    entries = mergecli.info(BASE).tensors
    for name, (_, shape) in entries.items():
        module = name.removesuffix(".weight")
        if name != module and module.rpartition(".")[2] in config["target_modules"]:
            for part, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                key = f"base_model.model.{module}.lora_{part}.weight"
                weights[key] = 0.05 * torch.randn(size, generator=generator)
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, place / "adapter_model.safetensors")
    return folder


def picture(label: int, seed: int) -> bytes:
    """A PNG file of noise, tinted by its class."""
    noise = np.random.default_rng([label, seed]).integers(0, 120, (20, 24, 3))
    noise[:, :, label % 3] += 100
    buffer = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_image_folder(folder: str, classes: Sequence[str]) -> None:
    for label, name in enumerate(classes):
        place = Path(folder, name)
        place.mkdir(parents=True)
        for number in range(4):
            (place / f"{number}.png").write_bytes(picture(label, number))


def make_parquet(folder: str, classes: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    Path(folder).mkdir(parents=True)
    for split, count in (("train", 12), ("test", 9)):
        labels = [number % classes for number in range(count)]
        images = [
            {"bytes": picture(label, count + number), "path": None} for number, label in enumerate(labels)
        ]
        table = pa.table({"image": images, "label": labels})
        parquet.write_table(table, f"{folder}/{split}-00000-of-00001.parquet")


def recipe(path: str, tuned: Mapping[str, str], *more: str, base: str = BASE) -> str:
    """A recipe's file."""
    lines = ["schema = 1", f'base = "{base}"', f"seed = {SEED}", "[tuned]"]
    lines += [f'{name} = "{source}"' for name, source in tuned.items()]
    Path(path).write_text("\n".join([*lines, *more]) + "\n")
    return path


# ---------------------------------------------------------------- sections


def merged(
    tuned: Mapping[str, str],
    case: Case,
    *changes: str,
    base: str = BASE,
    output: str = "m.safetensors",
    **more: Any,
) -> Any:
    """Digests of what a merge writes."""
    method, settings = case
    if "weights" in settings:
        settings = {**settings, "weights": settings["weights"][: len(tuned)]}
    seed = f"seed={SEED}"
    mergecli.merge(
        tuned, base=base, method=method, settings=settings, changes=[seed, *changes], output=output,
        card=False, **more,
    )  # fmt: skip
    return taken(output)


def first(tuned: Mapping[str, str], count: int) -> dict[str, str]:
    return dict(list(tuned.items())[:count])


def toys(record: Record) -> None:
    """Every method on models that come with the program, in float32, where no bit is rounded away."""
    for name, case in (BY_ENTRY | SPECTRAL | MATRICES | LOOKING).items():
        record.case(name, lambda case=case: merged(TOYS, case, "dtype=float32"))
    for name, case in PAIRS.items():
        record.case(name, lambda case=case: merged(first(TOYS, 2), case, "dtype=float32"))
    record.case("tall_mask of one", lambda: merged(TOYS, ("tall_mask", {"task": "shapes"}), "dtype=float32"))
    for dtype in ("same", "float16", "bfloat16"):
        for name in ("average", "ties", "emr", "tsv_m", "smile", "dare"):
            case = (BY_ENTRY | SPECTRAL)[name]
            record.case(
                f"{name} as {dtype}", lambda case=case, dtype=dtype: merged(TOYS, case, f"dtype={dtype}")
            )
    for seed in (0, 123):
        record.case(f"della, seed {seed}", lambda seed=seed: merged(TOYS, ("della", {}), f"seed={seed}"))
    record.case("folder", lambda: merged(TOYS, ("ties", {}), output="folder"))
    record.case(
        "folder in shards",
        lambda: merged(TOYS, ("ties", {}), "dtype=float32", output="folder", shard_size="700KB"),
    )
    record.case("surgery", surgery)
    record.case("learnt files", learnt_files)
    record.case("statistics", statistics)
    record.case("methods without a case", without_a_case)


def without_a_case() -> list[str]:
    """Methods that this script does not merge with; a new one is to be added above."""
    known = {method for method, _ in (BY_ENTRY | PAIRS | SPECTRAL | LOOKING).values()} | {
        "representation_surgery"
    }
    listed = json.loads(run("methods", "--json").out)
    return sorted({each["method"] for each in listed} - known)


def surgery() -> Any:
    mergecli.merge(TOYS, base=BASE, method="average", output="average.safetensors")
    case = ("representation_surgery", {**SHORT, "merged": "average.safetensors", "rank": 4, "split": "train"})
    found = merged(TOYS, case)
    Path("average.safetensors").unlink()
    return found


def learnt_files() -> Any:
    """Coefficients and masks as files, with their traces; applied again; masks given to another method."""
    found: dict[str, Any] = {}
    for name in ("ada_merging", "concrete_task_arithmetic", "weight_ensembling_moe"):
        file = f"{name}.safetensors"
        found[f"{name}, saved"] = merged(TOYS, LOOKING[name], save_coefficients=file, trace="trace.csv")
        found[f"{name}, trace"] = taken("trace.csv")
        found[f"{name}, again"] = merged(TOYS, LOOKING[name], coefficients=file)
        found[f"{name}, file"] = kept(file)
    masks = ("concrete_ada_merging", {**SHORT, "masks": "concrete_task_arithmetic.safetensors"})
    found["masks of another"] = merged(TOYS, masks)
    return found


def statistics() -> Any:
    """What is measured, as files, and a merge with them."""
    place = recipe("measured.toml", first(TOYS, 2))
    found: dict[str, Any] = {}
    for name in ("fisher", "reg_mean", "reg_mean_plus_plus"):
        mergecli.measure(place, output=name, method=name, settings=FEW)
        found[name] = kept(name)
        mergecli.merge(place, method=name, settings=FEW, statistics=name, output="m.safetensors")
        found[f"{name}, merged"] = taken("m.safetensors")
    return found


def sizes(record: Record) -> None:
    """Methods on weights, on matrices as large as those of a ViT-B/32."""
    wide = make_towers("wide", 2, 3)
    for name, case in BY_ENTRY.items():
        record.case(name, lambda case=case: merged(wide, case, base="wide/base.safetensors"))
    for name, case in PAIRS.items():
        record.case(name, lambda case=case: merged(first(wide, 2), case, base="wide/base.safetensors"))
    record.case(
        "ties as bfloat16", lambda: merged(wide, ("ties", {}), "dtype=bfloat16", base="wide/base.safetensors")
    )
    shutil.rmtree("wide")
    flat = make_towers("flat", 1, 2)
    for name, case in SPECTRAL.items():
        record.case(name, lambda case=case: merged(flat, case, base="flat/base.safetensors"))
    shutil.rmtree("flat")


def adapters(record: Record) -> None:
    """Adapters as inputs of methods on weights; and other forms in which models come."""
    tuned = {task: make_adapter(f"lora/{task}", number) for number, task in enumerate(first(TOYS, 3))}
    for name, case in (BY_ENTRY | SPECTRAL).items():
        record.case(name, lambda case=case: merged(tuned, case, "dtype=float32"))
    for name, case in PAIRS.items():
        record.case(name, lambda case=case: merged(first(tuned, 2), case, "dtype=float32"))
    record.case("ties as the base", lambda: merged(tuned, BY_ENTRY["ties"]))
    kinds: dict[str, dict[str, Any]] = {
        "rank-stabilized": {"use_rslora": True},
        "other alphas": {"lora_alpha": 3, "alpha_pattern": {"q_proj": 5}},
        "some layers": {"target_modules": ["q_proj"]},
    }
    for number, (name, more) in enumerate(kinds.items()):
        one = {"digits": make_adapter(f"lora/{name}", 10 + number, **more)}
        record.case(f"an adapter, {name}", lambda one=one: merged(one, ("average", {}), "dtype=float32"))
    mergecli.merge(first(TOYS, 2), base=BASE, method="ties", output="pair", shard_size="700KB")
    mergecli.merge(TOYS, base=BASE, method="emr", output="emr.safetensors")
    mergecli.taskvector("toy:digits", base=BASE, output="digits.safetensors")
    mixed = {
        "vector": "digits.safetensors", "tower": "toy:shapes", "adapter": tuned["colours"], "folder": "pair",
        "mixed": "emr.safetensors#faces", "index": "pair/model.safetensors.index.json",
    }  # fmt: skip
    for name in ("average", "ties", "karcher", "iso_c"):
        case = (BY_ENTRY | SPECTRAL)[name]
        record.case(f"{name} of all kinds of files", lambda case=case: merged(mixed, case, "dtype=float32"))
    record.case("info", lambda: {name: described(source) for name, source in mixed.items()})


def described(source: str) -> str:
    """What `info` says."""
    return digest(json.dumps(asdict(mergecli.info(source)), default=str))


def training(record: Record) -> None:
    """Fine-tuning for a few steps, low-rank adapters made of models, task vectors, cosines, and the pool."""
    steps: dict[str, Any] = {"base": BASE, "steps": 5, "learning_rate": 1e-3, "batch_size": 4, "seed": SEED}
    adapter = {"rank": 4, "alpha": 8}
    runs: dict[str, dict[str, Any]] = {
        "tower.safetensors": {"task": "digits"},
        "folder": {"task": "digits", "schedule": "constant", "weight_decay": 0.1},
        "half.safetensors": {"task": "digits", "dtype": "float16", "precision": "bfloat16", "accumulate": 2},
        "several.safetensors": {"task": ["digits", "faces"], "validate_every": 2},
        "lora": {"task": "shapes", "lora": True, **adapter},
        "lora-wide": {
            "task": "shapes",
            "lora": True,
            "target_modules": ["fc1", "q_proj"],
            "lora_dropout": 0.0,
        },
        "l-lora": {"task": "shapes", "l_lora": True, **adapter},
    }

    def tuned(output: str, more: Mapping[str, Any]) -> Any:
        mergecli.finetune(**steps, **more, output=output, trace="trace.csv")
        return {"output": kept(output), "trace": digest(without_times(Path("trace.csv").read_text()))}

    for output, more in runs.items():
        record.case(f"finetune {output}", lambda output=output, more=more: tuned(output, more))
    record.case(
        "merge of adapters", lambda: merged({"a": "lora", "b": "l-lora"}, ("ties", {}), "dtype=float32")
    )
    for output, more in {
        "rank": {"rank": 4},
        "energy": {"energy": 0.5},
        "some": {"rank": 2, "modules": ["q_proj"]},
    }.items():
        record.case(f"extract {output}", lambda output=output, more=more: extracted(output, more))
    record.case("taskvector", task_vectors)
    record.case("cos_sim", cosines)
    record.case("pool", pooled)


def without_times(table: str) -> str:
    """A CSV text without columns of seconds."""
    rows = [line.split(",") for line in table.splitlines()]
    wanted = [number for number, name in enumerate(rows[0]) if "second" not in name and "time" not in name]
    return "\n".join(",".join(row[number] for number in wanted if number < len(row)) for row in rows)


def extracted(output: str, more: Mapping[str, Any]) -> Any:
    found = asdict(mergecli.extract("toy:faces", base=BASE, output=output, **more))
    return {"told": digest(json.dumps(found, default=str)), "folder": taken(output)}


def task_vectors() -> Any:
    mergecli.taskvector(recipe("vectors.toml", TOYS), output="tv")
    mergecli.taskvector("toy:digits", base=BASE, output="tv/half.safetensors", dtype="bfloat16")
    return kept("tv")


def cosines() -> Any:
    vectors = {task: f"tv/{task}.safetensors" for task in TOYS}
    found = mergecli.cos_sim(vectors, output="cos.csv", layers="layers.csv", plot="cos.png")
    models = mergecli.cos_sim(first(TOYS, 2), base=BASE)
    return {
        "cosines": [list(row) for row in found.cosines], "norms": list(found.norms), "csv": kept("cos.csv"),
        "layers": kept("layers.csv"), "plot": kept("cos.png"), "of models": models.cosines[0][1],
    }  # fmt: skip


def pooled() -> Any:
    """The models as modules; one that was changed in memory, merged."""
    pool = mergecli.ModelPool(recipe("pool.toml", first(TOYS, 2)))
    module = pool.load_model("digits")
    state = {name: digest(each.detach().numpy().tobytes()) for name, each in module.state_dict().items()}
    image, label = pool.load_test_dataset("digits")[5]
    pixels = pool.load_processor()(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        clip = pool.load_clip_model("digits").vision_model(pixels).pooler_output
        next(module.parameters()).add_(0.25)
    changed = mergecli.ModelPool({"base": BASE, "digits": module, "shapes": "toy:shapes"})
    mergecli.merge(changed.recipe, method="average", output="m.safetensors")
    return {
        "names": list(pool), "state": digest(json.dumps(state)), "image": digest(image.tobytes()), "label": label,
        "output": digest(clip.numpy().tobytes()), "merged": kept("m.safetensors")["tensors"],
    }  # fmt: skip


def evaluations(record: Record) -> None:
    """Counts and losses, and tables of them."""
    tasks = ["digits", "colours", "faces"]
    toy = recipe("toy.toml", TOYS, "[eval]", "batch_size = 16", f"tasks = {json.dumps(tasks)}")
    make_image_folder("data/birds", ("robin", "wren", "owl"))
    make_parquet("data/signs", 3)
    own = recipe(
        "own.toml", {"birds": "toy:shapes", "signs": "toy:colours"},
        "[tasks.birds]", 'data = "data/birds"', 'templates = ["a photo of a {}.", "a {}."]',
        "[tasks.signs]", 'data = "data/signs"', 'classes = ["red", "green", "blue"]', 'templates = ["{}"]',
    )  # fmt: skip
    for name, (method, settings) in {
        "average": ("average", {}), "ties": ("ties", {}), "emr": ("emr", {}), "tsv_c": ("tsv_c", {}),
        "smile": SPECTRAL["smile"], "moe": LOOKING["weight_ensembling_moe"],
        "e-moe": LOOKING["efficient_weight_ensembling_moe"],
        "surgery": ("representation_surgery", {**SHORT, "merged": "average.safetensors"}),
    }.items():  # fmt: skip
        mergecli.merge(toy, method=method, settings=settings, output=f"{name}.safetensors")
    mergecli.taskvector("toy:digits", base=BASE, output="vector.safetensors")
    limited = {"recipe": toy, "limit": 24}
    routed = {name: f"{name}.safetensors" for name in ("smile", "moe", "e-moe")}
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": ("ties.safetensors", {**limited, "output": "ties.json", "predictions": "ties.parquet"}),
        "again, from the cache": ("ties.safetensors", limited),
        "without a cache": ("ties.safetensors", {**limited, "cache": False, "workers": 1}),
        "several at once": (
            {"average": "average.safetensors", "vector": "vector.safetensors", "base": BASE},
            {**limited, "output": "results", "predictions": "several.parquet"},
        ),
        "each on its own": ((), {**limited, "individual": True, "output": "own.json"}),
        "all of a recipe": ((), {**limited, "only": ["base", "digits"], "limit": 8}),
        "told the task": ({"emr": "emr.safetensors", "tsv_c": "tsv_c.safetensors"}, limited),
        "a tower of a mixture": ("emr.safetensors#digits", {**limited, "tasks": "digits"}),
        "each image routed": (routed, {**limited, "routes": "routes"}),
        "a batch routed": (routed, {**limited, "routing": "batch", "batch_size": 8}),
        "surgery": ("surgery.safetensors", limited),
        "half precision": ("ties.safetensors", {**limited, "dtype": "bfloat16"}),
        "another split": ("ties.safetensors", {**limited, "split": "train"}),
        "features": ("average.safetensors", {**limited, "limit": 6, "features": "features"}),
        "own images": ("ties.safetensors", {"recipe": own, "predictions": "own.parquet"}),
        "own images, corrupted": (
            "ties.safetensors",
            {"recipe": own, "corruption": "spatter", "severity": 2},
        ),
    } | {
        f"corrupted: {name}": ("ties.safetensors", {**limited, "limit": 6, "corruption": name, "severity": 3})
        for name in (
            "gaussian_noise",
            "motion_blur",
            "jpeg_compression",
            "contrast",
            "pixelate",
            "impulse_noise",
        )
    }
    for name, (checkpoints, more) in cases.items():
        record.case(name, lambda checkpoints=checkpoints, more=more: scored(checkpoints, more))
    for file in ("ties.parquet", "several.parquet", "own.parquet"):
        record.case(f"predictions {file}", lambda file=file: {"file": kept(file), "rows": rows_of(file)})
    record.case("features written", lambda: kept("features"))
    record.case("routes written", lambda: kept("routes"))
    record.case("sweep", lambda: swept(toy))
    for name, more in reports().items():
        record.case(f"report {name}", lambda more=more: reported(more))


def scored(checkpoints: Any, more: Mapping[str, Any]) -> Any:
    """Counts and losses, and the digest of all else that results say."""
    return results_of(mergecli.evaluate(checkpoints, **more))


def results_of(results: Iterable[Any]) -> Any:
    return {
        each.name: {
            "json": digest(each.to_json()),
            **{f"{task} {key}": getattr(score, key) for task, score in each.tasks.items() for key in ("correct", "loss")},
        }
        for each in results
    }  # fmt: skip


def rows_of(file: str) -> str:
    from pyarrow import parquet

    return digest(json.dumps(parquet.read_table(file).to_pydict(), default=str))


def swept(place: str) -> Any:
    found = mergecli.sweep(
        place, ["method.scaling_factor=0.1:0.5:0.2", "method.density=0.2,0.6"], method="ties", limit=20,
        select="validation", output="swept", keep="swept-towers", plot="sweep.png",
    )  # fmt: skip
    return {
        "best": found.best, "points": results_of(found.results), "confirmed": results_of([found.confirmed]),
        "table": digest(found.table.text("tsv")), "files": kept("swept"), "towers": kept("swept-towers"),
        "plot": kept("sweep.png"),
    }  # fmt: skip


def reports() -> dict[str, dict[str, Any]]:
    """Arguments of `report`, by what they show."""
    many = {"format": "tsv", "fine_tuned": "own.json"}
    return {
        **{f"as {form}": {"format": form} for form in ("tsv", "csv", "json", "md", "latex", "html")},
        "page": {"format": "html", "output": "report.html", "intervals": True, "against": "average"},
        "intervals": {"format": "md", "intervals": True, "sort": "average", "ascending": True},
        "against": {
            "format": "tsv",
            "against": "average",
            "predictions": ["ties.parquet", "several.parquet"],
        },
        "normalized": {**many, "normalized": True, "seen": "digits"},
        "losses": {"format": "json", "metric": "loss", "transpose": True},
        "published": {"format": "tsv", "reference": "clip-vit-base-patch32-ta8", "reference_rows": True},
        **{
            f"drawn as {kind}": {"format": "tsv", "plot": f"{kind}.png", "plot_kind": kind}
            for kind in ("bars", "radar", "heatmap")
        },
    }


def reported(more: Mapping[str, Any]) -> Any:
    files = ["results/base.json", "results/average.json", "ties.json", "own.json"]
    table = mergecli.report(files if "predictions" not in more else files[:3], **more)
    found: dict[str, Any] = {
        "text": digest(table.text(more["format"])),
        "told": digest(json.dumps([*table.warnings, *table.notes])),
    }
    return found | {name: kept(more[name]) for name in ("output", "plot") if name in more}


# ---------------------------------------------------------------- the command line


END = re.compile(r"^.*, peak [\d.]+ [MG]B(?:, GPU .*)?\n", re.MULTILINE)
"""The line with which a command ends: its seconds and memory are others each time."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said before its last line."""

    status: int
    out: str
    err: str


def run(*arguments: str, folder: str = ".", **environment: str) -> Ended:
    """Runs `mergecli ARGUMENTS` as a process, not on a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "mergecli", *arguments], cwd=folder, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=300,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "100", "TERM": "dumb"} | environment,
    )  # fmt: skip
    return Ended(done.returncode, without_places(done.stdout), without_places(END.sub("", done.stderr)))


def commands(record: Record) -> None:
    """Commands that do something, by their status, what they print, and what they write."""
    place = recipe("day.toml", first(TOYS, 2), "[method]", 'name = "ties"')
    day: dict[str, list[str]] = {
        "fetch": ["fetch", place],
        "fetch of data": ["fetch", place, "--only", "data", "--dry-run"],
        "taskvector": ["taskvector", place, "-o", "vectors"],
        "cos-sim": ["cos-sim", "vectors/digits.safetensors", "vectors/shapes.safetensors"],
        "merge": ["merge", place, "--set", "method.density=0.4", "-o", "ties.safetensors"],
        "merge, told as JSON": ["merge", "--base", BASE, "a=toy:digits", "toy:faces", "--method", "emr", "-o", "emr.safetensors", "--json"],
        "sweep": ["merge", place, "--sweep", "method.scaling_factor=0.1:0.3:0.1", "--sweep", "method.density=0.2,0.5", "-o", "swept"],
        "eval": ["eval", "ties.safetensors", "emr=toy:digits", "--recipe", place, "--limit", "10", "-o", "results"],
        "eval of a sweep": ["eval", "--recipe", place, "--sweep", "method.density=0.2,0.5", "--limit", "8", "--select", "train"],
        "report": ["report", "results/ties.json", "results/emr.json", "--against", "ties", "-o", "report.md"],
        "measure": ["measure", place, "--method", "fisher", "--set", "method.examples=4", "--task", "shapes", "-o", "measured"],
        "extract": ["extract", "toy:digits", "--base", BASE, "--rank", "2", "-o", "adapter", "--json"],
        "finetune": ["finetune", "--base", BASE, "--task", "digits", "--steps", "2", "--batch-size", "4", "-o", "tuned.safetensors"],
        "info": ["info", "ties.safetensors"],
        "info of a mixture": ["info", "emr.safetensors#faces", "--json"],
        "info of an adapter": ["info", "adapter"],
        "keys": ["info", "ties.safetensors", "--keys", "--format", "csv"],
        "recipe": ["info", "ties.safetensors", "--recipe"],
        "report as a table": ["report", "results/ties.json", "--format", "table"],
        "methods": ["methods", "--format", "tsv"],
    }  # fmt: skip
    for name, arguments in day.items():
        ended = run(*arguments)
        record.add(name, {"status": ended.status, "out": digest(ended.out)})
        record.note(name, {"out": ended.out[:400], "err": ended.err})
    for output in (
        "vectors",
        "ties.safetensors",
        "emr.safetensors",
        "swept",
        "results",
        "measured",
        "adapter",
        "tuned.safetensors",
        "report.md",
    ):
        record.case(f"written {output}", lambda output=output: kept(output))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Generator[str]:
    """The address of a server that answers as Hugging Face does for these repositories, each with one commit."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, content = self.path.partition("?")[0].strip("/"), b""
            for name, folder in repositories.items():
                if path == f"api/models/{name}/revision/main":
                    content = json.dumps({"sha": COMMIT}).encode()
                elif path == f"api/models/{name}/tree/{COMMIT}":
                    content = json.dumps([listing(each) for each in sorted(folder.iterdir())]).encode()
                elif path.startswith(f"{name}/resolve/{COMMIT}/"):
                    content = (folder / path.rpartition("/")[2]).read_bytes()
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    def listing(file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        entry: dict[str, Any] = {"type": "file", "path": file.name, "size": len(content)}
        if file.suffix == ".safetensors":
            return entry | {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}}
        return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def locks(record: Record) -> None:
    """What `fetch` brings from a hub, the lock that it writes, and a merge of what the lock names."""
    mergecli.merge(TOYS, base=BASE, method="ties", output="ties")
    make_adapter("adapter", SEED)
    place = recipe("hub.toml", {"digits": "toy:digits", "ties": "hf:org/ties", "low": "hf:org/adapter"})
    merging = ["merge", place, "--method", "average", "-o", "m.safetensors"]
    with hub({"org/ties": Path("ties"), "org/adapter": Path("adapter")}) as address:
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HOME": "hf"}
        steps: dict[str, tuple[list[str], dict[str, str]]] = {
            "merge before": (merging, {}),
            "plan": (["fetch", place, "--dry-run"], online),
            "fetch": (["fetch", place, "--jobs", "1"], online),
            "fetch again": (["fetch", place], online),
            "locked": (["fetch", place, "--locked", "--offline"], {}),
            "verify": (["fetch", place, "--verify"], {}),
            "no such repository": (["fetch", "hf:org/none"], online),
            "merge": (merging, {}),
        }
        for name, (arguments, environment) in steps.items():
            ended = run(*arguments, **environment)
            out, err = (
                text.replace(address, "HUB").replace(address[7:], "HUB") for text in (ended.out, ended.err)
            )
            record.add(name, {"status": ended.status, "out": digest(out)})
            record.note(name, {"out": out, "err": err})
    record.case("hub.lock", lambda: Path("hub.lock").read_text())
    record.case("merged", lambda: kept("m.safetensors"))
    record.case("store", lambda: kept("store/hf/org"))


def lists(record: Record) -> None:
    """What the program says of itself: commands with their options, methods with their settings, tasks."""
    for command in ([], *([each] for each in COMMANDS)):
        name, ended = " ".join(["mergecli", *command]), run(*command, "--help")
        options = sorted(set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", ended.out, re.MULTILINE)))
        record.add(f"{name} --help", {"status": ended.status, "options": options})
        record.note(f"{name} --help", ended.out)
    listed = json.loads(run("methods", "--json").out)
    record.add("methods", [each["method"] for each in listed])
    for each in listed:
        name = f"methods {each['method']}"
        text, table = run("methods", each["method"]), run("methods", each["method"], "--json")
        record.add(f"{name}: settings", re.findall(r"^method\..*", text.out, re.MULTILINE))
        record.note(name, digest(text.out))
        record.note(f"{name} --json: status", table.status)
        if table.status == 0:
            values = json.loads(table.out)
            settings = [{**each, "documentation": ""} for each in values.pop("settings")]
            record.add(f"{name} --json", {"keys": sorted(values), "settings": settings})
            record.note(f"{name} --json", digest(table.out))
    told = run("tasks", "--json")
    rows = json.loads(told.out)
    record.add("tasks", [{key: value for key, value in row.items() if key != "what it is"} for row in rows])
    record.note("tasks", digest(told.out))
    for name in ("ta8", "tall20", "toy8"):
        record.add(f"tasks {name}", digest(run("tasks", name, "--json").out))
    for row in rows:
        values = json.loads(run("tasks", row["task"], "--json").out)
        record.note(f"tasks {row['task']}", values.pop("description"))
        record.add(f"tasks {row['task']}", digest(json.dumps(values)))


def mistakes(record: Record) -> None:
    """Commands that are wrong: their statuses, the first lines of their messages, and that nothing is left behind."""
    make_mistakes(Path("mistakes"))
    before = sorted(each.name for each in Path("mistakes").iterdir())
    for name, line in MISTAKES.items():
        ended = run(*line.format(**SHORTHANDS).split(), folder="mistakes")
        record.add(name, ended.status)
        record.note(name, next(iter(ended.err.splitlines()), ""))
        if ended.out:
            record.note(f"{name}: out", digest(ended.out))
    left = sorted({each.name for each in Path("mistakes").iterdir()} - set(before))
    record.add("files left behind", left)


SHORTHANDS = {
    "merge": "merge --base base.safetensors t1.safetensors t2.safetensors",
    "ties": "--method ties -o m.safetensors",
    "eval": "eval toy:base --clip toy:base --task digits --limit 4",
    "tune": "finetune --base toy:base --task digits --steps 1",
}
MISTAKES = {
    "no such command": "mrege",
    "no command": "",
    "no such option": "merge --no-such-option",
    "no output": "merge t1.safetensors --method average",
    "no method": "{merge} -o m.safetensors",
    "unknown method": "{merge} --method tise -o m.safetensors",
    "unknown setting": "{merge} {ties} --set method.densty=0.1",
    "setting out of range": "{merge} {ties} --set method.density=2",
    "setting of a wrong type": "{merge} {ties} --set method.density=many",
    "required setting": "{merge} --method weighted_average -o m.safetensors",
    "modifier of itself": "{merge} --method dare --set method.of={{name='dare'}} -o m.safetensors",
    "three for a line": "{merge} t3.safetensors --method linear -o m.safetensors",
    "change that is none": "{merge} {ties} --set density",
    "unknown key": "merge unknown-key.toml -o m.safetensors",
    "not TOML": "merge not-toml.toml -o m.safetensors",
    "several problems": "merge several.toml -o m.safetensors",
    "another version": "merge version.toml -o m.safetensors",
    "missing recipe": "merge missing.toml -o m.safetensors",
    "base of a recipe twice": "merge several.toml --base base.safetensors -o m.safetensors",
    "missing model": "merge --base base.safetensors missing.safetensors {ties}",
    "no base": "merge t1.safetensors t2.safetensors {ties}",
    "a model named base": "merge --base base.safetensors base=t1.safetensors {ties}",
    "two of a name": "{merge} t1.safetensors {ties}",
    "suffix": "{merge} --method ties -o m.bin",
    "mixture into a folder": "{merge} --method emr -o folder",
    "shards of a file": "{merge} {ties} --shard-size 1MB",
    "size": "{merge} --method ties -o folder --shard-size large",
    "output is an input": "{merge} --method ties -o ./t1.safetensors",
    "output below a file": "{merge} --method ties -o t1.safetensors/m.safetensors",
    "misfit": "merge --base base.safetensors misfit.safetensors {ties}",
    "other whole numbers": "merge --base base.safetensors counted.safetensors {ties}",
    "NaN": "merge --base base.safetensors nan.safetensors {ties}",
    "infinity": "merge --base base.safetensors infinity.safetensors --method average -o m.safetensors",
    "too large for its dtype": "{merge} {ties} --set dtype=float16 --set method.scaling_factor=1e9",
    "cut short": "merge --base base.safetensors short.safetensors {ties}",
    "text": "info text.safetensors",
    "pickle": "info pickle.pt",
    "empty folder": "info empty",
    "index without shards": "info index",
    "bad adapter": "merge --base toy:base bad-adapter --method average -o m.safetensors",
    "adapter without a base": "merge bad-adapter --method average -o m.safetensors",
    "no recipe in a file": "info t1.safetensors --recipe",
    "format": "info t1.safetensors --format xls",
    "unknown toy": "merge --base toy:bas toy:digits {ties}",
    "no such tower": "info t1.safetensors#digits",
    "task vector of a vector": "taskvector t1.safetensors -o v.safetensors",
    "dtype of a task vector": "taskvector t1.safetensors --base base.safetensors --dtype int8 -o v.safetensors",
    "cosines into one file": "cos-sim --base base.safetensors t1.safetensors -o c.csv --layers c.csv",
    "sweep of nothing": "{merge} --method ties --sweep method.density= -o swept",
    "sweep into a file": "{merge} --method ties --sweep method.density=0.1,0.2 -o swept.safetensors",
    "sweep with a twin": "{merge} --method ties --sweep method.density=0.1,0.1 -o swept",
    "no CLIP": "eval t1.safetensors -o x.json",
    "no tasks": "eval toy:base --clip toy:base",
    "unknown task": "eval toy:base --clip toy:base --task mnits",
    "data not in the store": "eval toy:base --clip toy:base --task mnist",
    "a percentage": "{eval} --min-average 70",
    "threshold": "{eval} --min-average 1",
    "threshold of a task": "{eval} --min digits=1",
    "unknown corruption": "{eval} --corruption fogg",
    "severity alone": "{eval} --severity 2",
    "unknown routing": "{eval} --routing token",
    "unknown split": "{eval} --split tset",
    "no tower": "eval t1.safetensors --clip toy:base --task digits",
    "select without a sweep": "{eval} --select validation",
    "missing result": "report missing.json",
    "not a result": "report text.json",
    "format of a report": "report text.json --format xls",
    "unknown reference": "report text.json --reference clip",
    "nothing to measure": "measure models.toml --method ties -o measured",
    "fine-tuning without a base": "finetune --task digits -o tuned.safetensors",
    "suffix of a tower": "{tune} -o tuned.bin",
    "rank without an adapter": "{tune} --rank 4 -o tuned.safetensors",
    "no rank": "extract toy:digits --base toy:base -o adapter",
    "rank too large": "extract toy:digits --base toy:base --rank 4000 -o adapter",
    "no network": "fetch hf:org/name",
    "unknown model": "fetch toy:bas",
    "unknown kind": "cache pixls",
    "size of the cache": "cache --max-size large",
    "methods NAME": "methods tise",
    "tasks NAME": "tasks mnits",
}  # fmt: skip
"""Commands, each wrong in one way, of which some are only beginnings that `SHORTHANDS` completes."""


def make_mistakes(place: Path) -> None:
    """A folder with a small base and models, some of which are wrong."""
    place.mkdir()
    generator = torch.Generator().manual_seed(SEED)
    shapes = {
        "layer.0.weight": (7, 5),
        "layer.0.bias": (7,),
        "scale": (),
        "conv": (3, 2, 4, 4),
        "long": (500,),
    }
    floats = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = {**floats, "steps": torch.arange(4)}
    models = {f"t{number}": {**near(floats, number), "steps": torch.arange(4)} for number in (1, 2, 3)}
    models |= {
        "base": base,
        "misfit": {name: each for name, each in base.items() if name != "scale"} | {"extra": torch.ones(1)},
        "counted": {**models["t1"], "steps": torch.arange(4) + 1},
        "nan": {**models["t1"], "long": torch.full((500,), float("nan"))},
        "infinity": {**models["t1"], "long": torch.full((500,), float("inf"))},
    }
    for name, weights in models.items():
        save_file(weights, place / f"{name}.safetensors")
    (place / "short.safetensors").write_bytes((place / "t1.safetensors").read_bytes()[:-4])
    torch.save({"x": torch.ones(2)}, place / "pickle.pt")
    (place / "empty").mkdir()
    (place / "index").mkdir()
    (place / "bad-adapter").mkdir()
    (place / "bad-adapter" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (place / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "no.safetensors"}}')
    texts = {
        "text.safetensors": "no checkpoint at all",
        "text.json": "{}",
        "unknown-key.toml": 'bass = "toy:base"\n[tuned]\na = "t1.safetensors"\n[method]\nname = "ties"\n',
        "not-toml.toml": "base = \n",
        "several.toml": 'seed = -1\ndtype = "half"\n[tuned]\na = 3\n[method]\nname = "ties"\ndensity = 2\n',
        "version.toml": 'schema = 2\n[method]\nname = "average"\n[tuned]\na = "t1.safetensors"\n',
        "models.toml": 'base = "toy:base"\n[tuned]\ndigits = "toy:digits"\n',
    }
    for name, text in texts.items():
        (place / name).write_text(text)


SECTIONS: dict[str, Callable[[Record], None]] = {
    each.__name__: each
    for each in (toys, sizes, adapters, training, evaluations, commands, locks, lists, mistakes)
}


# ---------------------------------------------------------------- recording and comparing


def record_all(sections: Sequence[str]) -> Record:
    """The record of these sections, each made in an empty folder of its own."""
    record = Record()
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as place:
        for name in sections:
            started = time.perf_counter()
            folder = Path(place, name)
            folder.mkdir()
            os.chdir(folder)
            os.environ["MERGECLI_HOME"] = str(folder / "store")
            record.section = name
            try:
                record.case("section", lambda section=SECTIONS[name]: section(record) or {})
                entries = mergecli.cache().entries
                record.note(
                    "kept in the store", sorted(f"{each.kind}: {each.what}: {each.size}" for each in entries)
                )
            finally:
                os.chdir(before)
            shutil.rmtree(folder)
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return record


def compare(found: Record, record: Mapping[str, Any], sections: Sequence[str]) -> int:
    """Prints what differs; how many results do."""
    differences = 0
    for kind, new in (("results", found.results), ("notes", found.notes)):
        old = {name: each for name, each in record[kind].items() if name.partition("/")[0] in sections}
        new = json.loads(json.dumps(new))
        for name in [*old, *(name for name in new if name not in old)]:
            if name in old and name in new and old[name] == new[name]:
                continue
            counts = kind == "results" and name in old
            differences += counts
            what = "differs" if name in new and name in old else "is missing" if name in old else "is new"
            print(f"{'DIFFERENCE' if counts else 'note'}: {name} {what}")
            print(f"    was {shortened(old.get(name))}\n    is  {shortened(new.get(name))}")
    return differences


def shortened(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="where the record is written")
    parser.add_argument("--against", type=Path, help="a record to compare with")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    arguments = parser.parse_args()
    sections = [name for name in SECTIONS if name in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    old = json.loads(arguments.against.read_text("utf-8")) if arguments.against else None
    if old is not None and old["made_with"] != made_with():
        was, now = old["made_with"], made_with()
        different = [
            f"{key}: {was.get(key)} there, {now[key]} here" for key in now if was.get(key) != now[key]
        ]
        print(
            f"{arguments.against} was made with something else, so that numbers may be rounded otherwise:",
            file=sys.stderr,
        )
        print("\n".join(f"    {line}" for line in different), file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = record_all(sections)
    print(f"{len(found.results)} results, {len(found.notes)} notes of {PACKAGE}", file=sys.stderr)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(found.to_json(), "utf-8")
    if old is None:
        return 0
    differences = compare(found, old, sections)
    print(f"{differences} of {len(found.results)} results differ")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
