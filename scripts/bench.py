"""Times merges of checkpoints that have the shapes of CLIP vision towers, beside the plain cost of reading and writing
the same files and, where they are installed, beside FusionBench and mergekit. Every row is a whole process.

    python scripts/bench.py                                   eight ViT-B/32
    python scripts/bench.py --peers other-env/bin/python      with the programs of another environment beside
    python scripts/bench.py --memory                          max RSS for 2, 8, 20 models and for ViT-L/14
    python scripts/bench.py --large                           20 models of 1.2 GB under a memory limit of 1.5 GB
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

SHAPES = {"ViT-B/32": (768, 12, 32, 50), "ViT-L/14": (1024, 24, 14, 257)}
"""Width, layers, patch size and positions."""
MERGES = {
    "average": ["--method", "average"],
    "task_arithmetic": ["--method", "task_arithmetic"],
    "ties": ["--method", "ties"],
    "tsv_m": ["--method", "tsv_m"],
    "iso_c": ["--method", "iso_c"],
}
FUSION_BENCH = """
import sys, torch
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
MERGEKIT = {"average": "linear", "task_arithmetic": "task_arithmetic", "ties": "ties"}


@dataclass(frozen=True)
class Measured:
    """One process: seconds on the clock, seconds of processor, and the most memory it held."""

    what: str
    program: str
    seconds: float
    cpu_seconds: float
    max_rss_gb: float
    status: int


def measured(what: str, program: str, command: list[str], limit: int | None = None) -> Measured:
    """Runs the command; `limit` bounds its address space in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None,
    )  # fmt: skip
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        print(f"{program} {what}: failed\n{text.decode()[-800:]}", file=sys.stderr)
    return Measured(what, program, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6, status)


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


def theirs(what: str, place: Path, count: int, folder: Path, peers: str) -> list[tuple[str, list[str]]]:
    """The command lines of the other programs for the same work; each writes into `folder`."""
    output = folder / "fusion-bench"
    commands = [("FusionBench", [peers, "-c", FUSION_BENCH, str(place), str(count), what, str(output)])]
    if what in MERGEKIT:
        recipe = folder / "mergekit.yaml"
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
        program = str(Path(peers).parent / "mergekit-pytorch")
        commands.append(("mergekit", [program, str(recipe), str(folder / "mergekit")]))
    return commands


def fresh(folder: Path, keep: str = "") -> Path:
    """The folder, without anything in it but files that end in `keep`."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            shutil.rmtree(path)
        elif not keep or path.suffix != keep:
            path.unlink()
    folder.mkdir(exist_ok=True)
    return folder


def compared(what: str, program: str, command: list[str], folder: Path, least: int, most: int) -> Measured:
    """Another program's measurement; failed if it ends well but wrote no weights."""
    row = measured(what, program, command, most)
    written = sum(
        file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".csv")
    )
    if not row.status and written < least:
        print(f"{program} {what}: wrote {written} bytes, at least {least} were expected", file=sys.stderr)
        return replace(row, status=1)
    return row


def compare(
    folder: Path, peers: str | None, names: list[str], kind: str = "ViT-B/32", count: int = 8
) -> list[Measured]:
    """Every merge by us and by the others, after the floor, on the same files."""
    place = made(folder, kind, count)
    files = [place / name / "model.safetensors" for name in ("base", *(f"t{i}" for i in range(count)))]
    output = folder / "out.safetensors"
    rows = [measured("read all, write one", "system calls", floor(files, output)) for _ in range(2)][1:]
    most = int(0.92 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    rows.append(measured("import torch", "python", [sys.executable, "-c", "import torch"]))
    for what in names:
        rows.append(measured(what, "mergecli", ours(what, place, count, output)))
        if peers:
            least = 1 if what == "cos-sim" else files[0].stat().st_size * 9 // 10
            for name, command in theirs(what, place, count, fresh(folder / "peer"), peers):
                rows.append(compared(what, name, command, fresh(folder / "peer", keep=".yaml"), least, most))
    return rows


def memory(folder: Path) -> list[Measured]:
    """Max RSS against the number and the size of the models."""
    rows: list[Measured] = []
    for kind, counts in (("ViT-B/32", (2, 8, 20)), ("ViT-L/14", (2, 4))):
        for count in counts:
            place = made(folder, kind, count)
            for what in ("task_arithmetic", "ties", "cos-sim"):
                command = ours(what, place, count, folder / "out.safetensors")
                rows.append(measured(f"{what}, {count} x {kind}", "mergecli", command))
    return rows


def large(folder: Path) -> list[Measured]:
    """TIES on 20 models of 1.2 GB, as many real bytes, in an address space whose data may take 1.5 GB."""
    place = made(folder, "ViT-L/14", 20)
    return [
        measured(f"{what}, 20 x ViT-L/14, limit 1.5 GB", "mergecli", ours(what, place, 20, folder / "out.safetensors"), 1_500_000_000)
        for what in ("task_arithmetic", "ties")
    ]  # fmt: skip


def main() -> None:
    """Measures, prints a Markdown table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints are made and kept (default: a temporary one)"
    )
    parser.add_argument("--peers", help="the Python of an environment with fusion-bench and mergekit")
    parser.add_argument(
        "--only", default="average,task_arithmetic,ties,cos-sim,tsv_m,iso_c", help="what to measure"
    )
    parser.add_argument("--count", type=int, default=8, help="how many fine-tuned models")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--make", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.folder, given.make[0], int(given.make[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.memory:
            rows = memory(folder)
        elif given.large:
            rows = large(folder)
        else:
            rows = compare(folder, given.peers, given.only.split(","), count=given.count)
    least = next((row.seconds for row in rows if row.program == "system calls"), None)
    own = {row.what: row.seconds for row in rows if row.program == "mergecli"}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {version('torch')}\n"
    )
    print("| what | program | seconds | of the floor | of ours | CPU s | max RSS GB |")
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    for row in rows:
        floors = f"{row.seconds / least:.1f}" if least else "-"
        ratio = f"{row.seconds / own[row.what]:.1f}" if row.what in own else "-"
        note = "" if row.status == 0 else " (failed)"
        print(
            f"| {row.what} | {row.program}{note} | {row.seconds:.2f} | {floors} | {ratio} | {row.cpu_seconds:.1f} | {row.max_rss_gb:.2f} |"
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
