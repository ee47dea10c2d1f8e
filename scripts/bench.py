"""Times merges of checkpoints that have the shapes of CLIP vision towers, beside the plain cost of reading and writing
the same files and, where they are installed, beside FusionBench, mergekit and sd-mecha. Every row is a whole process.

    python scripts/bench.py                                   eight ViT-B/32
    python scripts/bench.py --repeat 5                        medians of five rounds, in each of which everything runs once
    python scripts/bench.py --beside old=../old-checkout      the same commands by another version of this repository
    python scripts/bench.py --peers other-env/bin/python      with the programs of another environment beside; repeatable
    python scripts/bench.py --memory                          max RSS for 2, 8, 20 models and for ViT-L/14
    python scripts/bench.py --growth                          time for more models, more tensors and larger ones
    python scripts/bench.py --cold                            the files not in the page cache
    python scripts/bench.py --large                           20 models of 1.2 GB under a memory limit of 1.5 GB

With `--json` the numbers go to `docs/benchmarks.json`; those of programs that were not measured this time stay, and are named as such.
Rounds alternate: each runs the programs in the order opposite to that of the one before, so that none profits from its place.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "benchmarks.json"
SHAPES = {
    "ViT-B/32": (768, 12, 32, 50),
    "ViT-L/14": (1024, 24, 14, 257),
    "small": (192, 12, 32, 50),
    "small, 24 layers": (192, 24, 32, 50),
    "small, 48 layers": (192, 48, 32, 50),
    "wide": (384, 12, 32, 50),
}
"""Width, layers, patch size and positions."""
MERGES = {
    "average": ["--method", "average"],
    "task_arithmetic": ["--method", "task_arithmetic"],
    "ties": ["--method", "ties"],
    "ties trim=tensor": ["--method", "ties", "--set", "method.trim=tensor"],
    "tsv_m": ["--method", "tsv_m"],
    "iso_c": ["--method", "iso_c"],
    "dc_merge": ["--method", "dc_merge"],
    "act_mat": ["--method", "act_mat"],
    "wudi solver=spectral": ["--method", "wudi", "--set", "method.solver=spectral"],
}
MOST_ROUNDS = {"tsv_m": 3}
"""Of commands that take so long that more rounds would say little."""
GROWS = {
    "models": [(2, "small"), (8, "small"), (20, "small"), (64, "small")],
    "tensors": [(8, "small"), (8, "small, 24 layers"), (8, "small, 48 layers")],
    "entries": [(8, "small"), (8, "wide"), (8, "ViT-B/32")],
}
"""What grows -> numbers and kinds of models."""
USUAL = "average,task_arithmetic,ties,cos-sim,iso_c,tsv_m"
FUSION_BENCH = """
import sys, torch
try: import torchvision
except RuntimeError:  # made for another torch: nothing here calls its operators, but they must be declared
    for name in [each for each in sys.modules if each.startswith("torchvision")]: del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"): library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError: pass
from transformers import CLIPVisionModel
from fusion_bench.modelpool import BaseModelPool
import fusion_bench.method as m
folder, count, what, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
load = lambda name: CLIPVisionModel.from_pretrained(f"{folder}/{name}", dtype=torch.float32)
class Pool(BaseModelPool):
    def load_model(self, name, *args, **kwargs):
        return load("base" if name == "_pretrained_" else name)
pool = Pool({"_pretrained_": None, **{f"t{i}": None for i in range(count)}})
if what == "average": method = m.SimpleAverageAlgorithm()
elif what == "task_arithmetic": method = m.TaskArithmeticAlgorithm(scaling_factor=0.3)
elif what == "ties": method = m.TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum")
elif what == "tsv_m": method = m.TaskSingularVectorMerging(alpha=1, exclude_keys=None, return_single_task_models=False)
elif what == "iso_c": method = m.ISO_C_Merge(scaling_factor=1.0, exclude_keys=None)
elif what == "cos-sim":
    from fusion_bench.method.analysis.task_vector_cos_similarity import TaskVectorCosSimilarity
    method = TaskVectorCosSimilarity(plot_heatmap=False, trainable_only=True, max_points_per_model=None, output_path=out)
model = method.run(pool)
if what != "cos-sim": model.save_pretrained(out)
"""
SD_MECHA = """
import sys, torch, sd_mecha as s
from sd_mecha.extensions.builtin.merge_methods.linear import add_difference
folder, count, what, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
base, *models = [s.model(f"{folder}/{name}/model.safetensors") for name in ("base", *(f"t{i}" for i in range(count)))]
if what == "average": recipe = s.n_average(*models)
elif what == "task_arithmetic": recipe = s.weighted_sum(base, s.n_average(*models), alpha=0.3 * count)
elif what == "ties":
    recipe = add_difference(base, s.ties_sum(*[s.subtract(each, base) for each in models], k=0.2), alpha=0.3)
s.merge(recipe, output=out, merge_dtype=torch.float32, output_dtype=torch.float32)
"""
SD_MECHA_MERGES = ("average", "task_arithmetic", "ties")
MERGEKIT = {"average": "linear", "task_arithmetic": "task_arithmetic", "ties": "ties"}


@dataclass(frozen=True)
class Case:
    """A command that is measured."""

    what: str
    program: str
    command: Sequence[str]
    folder: Path | None = None
    """Where it writes, if it is to be empty before."""
    least: int = 0
    """Bytes that it must have written there."""
    limit: int | None = None
    """Bytes of data that it may hold."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    rounds: int | None = None
    """The most rounds that it is measured in."""


@dataclass(frozen=True)
class Measured:
    """One process: seconds on the clock, seconds of processor, and the most memory it held."""

    seconds: float
    cpu_seconds: float
    max_rss_gb: float
    failed: str = ""
    """Why it failed, in a few words."""


@dataclass(frozen=True)
class Row:
    """A case and what it took: medians of the rounds, and the most memory of any."""

    case: Case
    rounds: Sequence[Measured]

    @property
    def failed(self) -> str:
        return next((each.failed for each in self.rounds if each.failed), "")

    @property
    def seconds(self) -> float:
        return statistics.median(each.seconds for each in self.rounds)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(each.cpu_seconds for each in self.rounds)

    @property
    def max_rss_gb(self) -> float:
        return max(each.max_rss_gb for each in self.rounds)

    @property
    def spread(self) -> str:
        """The least and the most seconds."""
        times = [each.seconds for each in self.rounds]
        return f"{min(times):.2f} to {max(times):.2f}" if len(times) > 1 else ""


def run(cases: Sequence[Case], rounds: int, cold: Sequence[Path] = ()) -> list[Row]:
    """Measures all cases once a round; what failed is not tried again.

    Args:
        cold: files that are dropped from the page cache before each process.
    """
    found: list[list[Measured]] = [[] for _ in cases]
    for turn in range(rounds):
        order = range(len(cases)) if turn % 2 == 0 else range(len(cases) - 1, -1, -1)
        for place in order:
            most = cases[place].rounds
            if any(each.failed for each in found[place]) or (most is not None and turn >= most):
                continue
            for path in cold:
                drop(path)
            found[place].append(measured(cases[place]))
            each = found[place][-1]
            print(
                f"{cases[place].program} {cases[place].what}: {each.failed or f'{each.seconds:.2f} s'}",
                file=sys.stderr,
            )
    return [Row(case, each) for case, each in zip(cases, found, strict=True)]


def measured(case: Case) -> Measured:
    """Runs the command."""
    if case.folder:
        fresh(case.folder, keep=".yaml")
    limit = case.limit
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                case.command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **case.environment},
                preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None,
            )  # fmt: skip
        except OSError as error:
            return Measured(0, 0, 0, f"did not start: {error.strerror}")
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip()
    failed = ""
    if process.returncode:
        print(text[-800:], file=sys.stderr)
        failed = "out of memory" if "Memory" in text or process.returncode == -9 else "failed"
    elif case.folder and case.least:
        written = [file for file in case.folder.rglob("*") if file.suffix in (".safetensors", ".csv")]
        if (size := sum(file.stat().st_size for file in written)) < case.least:
            failed = f"wrote {size} bytes"
    return Measured(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6, failed)


def drop(path: Path) -> None:
    """Drops a file from the page cache."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP vision tower's tensors."""
    width, layers, patch, positions = SHAPES[kind]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(layers):
        place = f"encoder.layers.{layer}."
        norms += [f"{place}layer_norm1", f"{place}layer_norm2"]
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {
                f"{place}self_attn.{part}.weight": (width, width),
                f"{place}self_attn.{part}.bias": (width,),
            }
        for part, shape in (("fc1", (4 * width, width)), ("fc2", (width, 4 * width))):
            shapes |= {f"{place}mlp.{part}.weight": shape, f"{place}mlp.{part}.bias": (shape[0],)}
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def made(folder: Path, kind: str, count: int) -> Path:
    """The folder of a base and `count` models, made if they are missing; by a process of its own, because a process
    counts its parent's memory as its own."""
    arguments = ["--make", kind, str(count), "--folder", str(folder)]
    subprocess.run([sys.executable, __file__, *arguments], check=True)
    return folder / kind.replace("/", "-")


def make(folder: Path, kind: str, count: int) -> None:
    """Makes a base and `count` models near it, as folders with a config, from a seed."""
    import torch
    from safetensors.torch import save_file

    place = folder / kind.replace("/", "-")
    width, layers, patch, _ = SHAPES[kind]
    config = {
        "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "patch_size": patch, "image_size": 224, "hidden_act": "quick_gelu", "projection_dim": 512,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes_of(kind).items()}
    for number in range(-1, count):
        model = place / ("base" if number < 0 else f"t{number}")
        if (model / "model.safetensors").exists():
            continue
        model.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number + 2)
        weights = (
            base
            if number < 0
            else {k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        )
        (model / "config.json").write_text(json.dumps(config))
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def floor(files: list[Path], output: Path) -> list[str]:
    """The command that reads all files and writes as much as one of them, with plain system calls."""
    code = (
        "import os,sys\nbuffer=memoryview(bytearray(1<<20))\nfiles,out=sys.argv[1:-1],sys.argv[-1]\n"
        "for f in files:\n d=os.open(f,os.O_RDONLY)\n while os.readv(d,[buffer]): pass\n os.close(d)\n"
        "d=os.open(out,os.O_WRONLY|os.O_CREAT|os.O_TRUNC)\nleft=os.path.getsize(files[0])\n"
        "while left>0: left-=os.write(d,buffer[:min(left,1<<20)])\nos.fsync(d)"
    )
    return [sys.executable, "-c", code, *map(str, files), str(output)]


def ours(what: str, place: Path, count: int, output: Path) -> list[str]:
    """The command line of one of our merges, or of `cos-sim`."""
    program = [sys.executable, "-m", "mergecli"]
    models = ["--base", str(place / "base"), *[str(place / f"t{i}") for i in range(count)]]
    if what == "cos-sim":
        return [*program, "cos-sim", *models, "-o", str(output.with_suffix(".csv"))]
    return [*program, "merge", *models, *MERGES[what], "-o", str(output)]


def installed(peers: str) -> dict[str, str]:
    """Which of the other programs the environment of a Python has -> their versions.

    Raises:
        SystemExit: the Python does not run.
    """
    wanted = {"FusionBench": "fusion_bench", "mergekit": "mergekit", "sd-mecha": "sd_mecha"}
    code = (
        "import json\nfrom importlib.metadata import version\nfrom importlib.util import find_spec\n"
        f"print(json.dumps({{n: version(m.replace('_', '-')) for n, m in {wanted!r}.items() if find_spec(m)}}))"
    )
    try:
        text = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"--peers {peers}: this Python does not run: {error}") from None
    found: dict[str, str] = json.loads(text)
    if "mergekit" in found and not (Path(peers).parent / "mergekit-pytorch").exists():
        del found["mergekit"]
    for name in wanted:
        if name not in found:
            print(f"{name}: not installed for {peers}, left out", file=sys.stderr)
    return found


def theirs(
    what: str,
    place: Path,
    count: int,
    folder: Path,
    peers: str,
    programs: Collection[str],
    least: int,
    rounds: int | None,
) -> list[Case]:
    """The other programs on the same work; each writes into a folder of its own."""
    most = int(0.92 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    found: list[Case] = []

    def add(program: str, command: Sequence[str], output: Path) -> None:
        found.append(Case(what, program, command, output, least, most, rounds=rounds))

    if "FusionBench" in programs and f'"{what}"' in FUSION_BENCH:
        output = folder / "fusion-bench"
        add(
            "FusionBench",
            [peers, "-c", FUSION_BENCH, str(place), str(count), what, str(output / "model")],
            output,
        )
    if "mergekit" in programs and what in MERGEKIT:
        output = folder / "mergekit"
        output.mkdir(parents=True, exist_ok=True)
        recipe = output / "recipe.yaml"
        models = [
            {"model": str(place / f"t{i}/model.safetensors"), "parameters": {"weight": 1.0, "density": 0.2}}
            for i in range(count)
        ]
        text = {
            "merge_method": MERGEKIT[what],
            "models": models,
            "dtype": "float32",
            "parameters": {"normalize": what == "average", "lambda": 0.3},
        }
        if what != "average":
            text["base_model"] = str(place / "base/model.safetensors")
        recipe.write_text(json.dumps(text))
        add(
            "mergekit",
            [str(Path(peers).parent / "mergekit-pytorch"), str(recipe), str(output / "model")],
            output,
        )
    if "sd-mecha" in programs and what in SD_MECHA_MERGES:
        output = folder / "sd-mecha"
        file = output / "m.safetensors"
        add("sd-mecha", [peers, "-c", SD_MECHA, str(place), str(count), what, str(file)], output)
    return found


def fresh(folder: Path, keep: str = "") -> Path:
    """The folder, without anything in it but files that end in `keep`."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            shutil.rmtree(path)
        elif not keep or path.suffix != keep:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def floors(place: Path, count: int, output: Path) -> list[Case]:
    """What no merge of these files can do without."""
    files = models_of(place, count)
    return [
        Case("read all, write one", "system calls", floor(files, output)),
        Case("import torch", "python", [sys.executable, "-c", "import torch"]),
    ]


def models_of(place: Path, count: int) -> list[Path]:
    return [place / name / "model.safetensors" for name in ("base", *(f"t{i}" for i in range(count)))]


def of_checkout(root: Path) -> dict[str, str]:
    """The environment in which `python -m mergecli` is the one of that checkout, whatever folder it is started in."""
    environment = {"PYTHONPATH": str(root.absolute()), "PYTHONSAFEPATH": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import mergecli; print(mergecli.__file__)"],
        capture_output=True, text=True, env={**os.environ, **environment},
    ).stdout.strip()  # fmt: skip
    if not Path(found).is_relative_to(root.absolute()):
        raise SystemExit(f"{root}: expected a checkout of mergecli, but `mergecli` is {found or 'nowhere'}")
    return environment


def compared(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Every merge by us, by other versions of us and by others, beside the floor, on the same files."""
    place = made(folder, given.kind, given.count)
    output = folder / "out.safetensors"
    cases = floors(place, given.count, output)
    for what in given.only.split(","):
        command = ours(what, place, given.count, output)
        for name, other in [("mergecli", ROOT), *given.beside]:
            most = MOST_ROUNDS.get(what)
            cases.append(Case(what, name, command, environment=of_checkout(other), rounds=most))
        least = 1 if what == "cos-sim" else models_of(place, 0)[0].stat().st_size * 9 // 10
        for peers, programs in given.peers.items():
            cases += theirs(
                what, place, given.count, folder / "peers", peers, programs, least, given.peer_rounds
            )
    cold = models_of(place, given.count) if given.cold else []
    run(cases[:1], 1)  # the files come into the page cache
    return run(cases, given.repeat, cold)


def memory(folder: Path, rounds: int) -> list[Row]:
    """Max RSS against the number and the size of the models."""
    cases: list[Case] = []
    for kind, counts in (("ViT-B/32", (2, 8, 20)), ("ViT-L/14", (2, 4))):
        for count in counts:
            place = made(folder, kind, count)
            for what in ("task_arithmetic", "ties", "cos-sim"):
                command = ours(what, place, count, folder / "out.safetensors")
                cases.append(Case(f"{what}, {count} x {kind}", "mergecli", command))
    return run(cases, rounds)


def growth(folder: Path, rounds: int) -> list[Row]:
    """Time against the number of models, of tensors and of entries, each beside the floor of the same files."""
    cases: list[Case] = []
    for count, kind in dict.fromkeys(each for points in GROWS.values() for each in points):
        place, output = made(folder, kind, count), folder / "out.safetensors"
        cases.append(Case(f"{count} x {kind}", "system calls", floor(models_of(place, count), output)))
        cases += [
            Case(f"{what}, {count} x {kind}", "mergecli", ours(what, place, count, output))
            for what in ("average", "ties", "cos-sim")
        ]
    return run([Case("import torch", "python", [sys.executable, "-c", "import torch"]), *cases], rounds)


@dataclass(frozen=True)
class Line:
    """How the time of a command grows with what it reads."""

    grows: str
    what: str
    slope: float
    """Seconds more for each second more of the floor."""
    bend: float
    """The largest distance of a measured point from the line, as a share of what the time grows by."""


def lines(rows: Sequence[Row]) -> list[Line]:
    """The straight lines through the times of each command against the floor's, by least squares."""
    seconds = {row.case.what: row.seconds for row in rows}
    found: list[Line] = []
    for grows, points in GROWS.items():
        floors = [seconds[f"{count} x {kind}"] for count, kind in points]
        for what in ("average", "ties", "cos-sim"):
            times = [seconds[f"{what}, {count} x {kind}"] for count, kind in points]
            slope, start = statistics.linear_regression(floors, times)
            off = max(abs(time - start - slope * under) for time, under in zip(times, floors, strict=True))
            found.append(Line(grows, what, slope, off / (max(times) - min(times))))
    return found


def large(folder: Path, rounds: int) -> list[Row]:
    """TIES on 20 models of 1.2 GB, as many real bytes, in an address space whose data may take 1.5 GB."""
    place = made(folder, "ViT-L/14", 20)
    cases = [
        Case(f"{what}, 20 x ViT-L/14, limit 1.5 GB", "mergecli", ours(what, place, 20, folder / "out.safetensors"), limit=1_500_000_000)
        for what in ("task_arithmetic", "ties")
    ]  # fmt: skip
    return run(cases, rounds)


def shown(rows: Sequence[Row]) -> str:
    """A Markdown table. `of the floor` takes off what importing torch takes, from the whole of ours too."""
    floor_of = {row.case.what: row.seconds for row in rows if row.case.program == "system calls"}
    least = floor_of.get("read all, write one")
    start = next((row.seconds for row in rows if row.case.what == "import torch"), 0.0)
    own = {row.case.what: row.seconds for row in rows if row.case.program == "mergecli"}
    lines = [
        "| what | program | seconds | rounds | after `import torch`, of the floor | of ours | CPU s | max RSS GB |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        case = row.case
        if row.failed:
            lines.append(f"| {case.what} | {case.program} | {row.failed} | | | | | {row.max_rss_gb:.2f} |")
            continue
        under = floor_of.get(case.what.partition(", ")[2], least)
        plain = case.program in ("system calls", "python")
        share = f"{(row.seconds - start) / under:.1f}" if under and not plain else ""
        ratio = f"{row.seconds / own[case.what]:.2f}" if case.what in own else ""
        lines.append(
            f"| {case.what} | {case.program} | {row.seconds:.2f} | {row.spread} | {share} | {ratio} | {row.cpu_seconds:.1f} | {row.max_rss_gb:.2f} |"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], given: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """What the picture of the README and the tables of the documentation are made from.

    Args:
        before: the same of an earlier run. What this one did not measure stays: other sections, and programs that are not
            installed here, which `earlier` names.
    """
    table = {row["name"]: row for row in _numbers(rows)}
    about = f"{os.cpu_count()} processors, torch {version('torch')}, medians of {given.repeat}"
    command = "python scripts/bench.py " + " ".join(
        re.sub(r"[^= ]*/[^ ]*", "PATH", each) for each in sys.argv[1:]
    )
    if given.growth:
        found = [
            {
                "grows": each.grows,
                "what": each.what,
                "slope": round(each.slope, 2),
                "bend": round(each.bend, 3),
            }
            for each in lines(rows)
        ]
        return before | {
            "growth": {"measured": about, "command": command, "rows": list(table.values()), "lines": found}
        }
    if given.cold:
        return before | {"cold": {"measured": about, "command": command, "rows": list(table.values())}}
    programs = {name: text for peers in given.peers.values() for name, text in peers.items()}
    earlier = {
        name: text for name, text in before.get("programs", {}).items() if name not in programs and text
    }
    for row in before.get("rows", []):
        for name in earlier:
            if name in row and row["name"] in table:
                table[row["name"]][name] = row[name]
    size = 4 * sum(_entries(shape) for shape in shapes_of(given.kind).values()) / 1e9
    return before | {
        "measured": about,
        "what": f"{given.count} {given.kind} in float32: {size * (given.count + 1):.1f} GB read, {size:.2f} GB written; "
        "files in the page cache; each row a whole process",
        "command": command,
        "programs": {"mergecli": "", **dict.fromkeys((name for name, _ in given.beside), ""), **programs, **earlier},
        "earlier": sorted(earlier),
        "units": {"seconds": "wall time", "gigabytes": "max RSS", "cpu_seconds": "processor time"},
        "rows": list(table.values()),
    }  # fmt: skip


def _numbers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each program took, a table for each command."""
    names: dict[str, dict[str, Any]] = {}
    for row in rows:
        numbers: dict[str, Any] = {
            "seconds": round(row.seconds, 2),
            "gigabytes": round(row.max_rss_gb, 2),
            "cpu_seconds": round(row.cpu_seconds, 2),
            "rounds": len(row.rounds),
        }
        if row.failed:
            most = f" at {row.max_rss_gb:.0f} GB" if row.failed == "out of memory" else ""
            numbers = {"failed": row.failed + most}
        names.setdefault(row.case.what, {"name": row.case.what})[row.case.program] = numbers
    return list(names.values())


def _entries(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or not (Path(folder) / "mergecli").is_dir():
        raise argparse.ArgumentTypeError(
            f"expected NAME=FOLDER with a folder that holds `mergecli`, got `{text}`"
        )
    return name, Path(folder).resolve()


def main() -> None:
    """Measures, prints a Markdown table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are made and kept (default: a temporary one)"
    )
    parser.add_argument(
        "--peers",
        action="append",
        default=[],
        help="the Python of an environment with fusion-bench, mergekit or sd-mecha",
    )
    parser.add_argument(
        "--peer-rounds", type=int, help="the most rounds of other programs, which take minutes"
    )
    parser.add_argument(
        "--beside", type=_named, action="append", default=[], metavar="NAME=FOLDER", help="another version"
    )
    parser.add_argument(
        "--only", default=USUAL, help=f"what to measure, of {', '.join([*MERGES, 'cos-sim'])}"
    )
    parser.add_argument("--repeat", type=int, default=1, help="rounds")
    parser.add_argument("--count", type=int, default=8, help="how many fine-tuned models")
    parser.add_argument("--kind", choices=list(SHAPES), default="ViT-B/32")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=NUMBERS,
        help="write the measurements to this file, or to docs/benchmarks.json",
    )
    parser.add_argument("--make", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.folder, given.make[0], int(given.make[1]))
        return
    if unknown := [each for each in given.only.split(",") if each not in (*MERGES, "cos-sim")]:
        parser.error(f"--only: unknown: {', '.join(unknown)}; there are {', '.join([*MERGES, 'cos-sim'])}")
    given.peers = {each: installed(each) for each in given.peers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if given.memory:
            rows = memory(folder, given.repeat)
        elif given.growth:
            rows = growth(folder, given.repeat)
        elif given.large:
            rows = large(folder, given.repeat)
        else:
            rows = compared(folder, given)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {version('torch')}\n"
    )
    print(shown(rows))
    if given.growth:
        for each in lines(rows):
            print(
                f"{each.what} against {each.grows}: {each.slope:.2f} floors more for each, off the line by {each.bend:.1%}"
            )
    if given.json:
        before = json.loads(given.json.read_text()) if given.json.exists() else {}
        given.json.write_text(json.dumps(as_json(rows, given, before), indent=2) + "\n")


if __name__ == "__main__":
    main()
