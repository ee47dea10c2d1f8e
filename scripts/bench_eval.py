"""Times evaluation beside the bare forward pass of the same model on the same machine, round after round, and where
it is installed beside FusionBench. The CLIP (shape of ViT-B/32, random weights) and the images are made from a seed.

    python scripts/bench_eval.py                                    512 images of 400 x 300, 3 rounds
    python scripts/bench_eval.py --size 256 256 --only first,decoded
    python scripts/bench_eval.py --images 2000 --device cuda
    python scripts/bench_eval.py --peers other-env/bin/python       with FusionBench's loop of another environment
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLASSES = [f"class number {number}" for number in range(10)]
TEMPLATES = ("a photo of a {}.", "a picture of the {}.")
FUSION_BENCH = """
import sys, time, torch
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip import modeling_clip
if not hasattr(modeling_clip, "CLIPVisionTransformer"): modeling_clip.CLIPVisionTransformer = modeling_clip.CLIPVisionModel
from transformers import CLIPImageProcessorPil
from datasets import Dataset, Image, disable_progress_bars
from fusion_bench.dataset import CLIPDataset
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.taskpool.clip_vision.taskpool import CLIPVisionModelTaskPool
from torch.utils.data import DataLoader
disable_progress_bars()
folder, data, cache, threads = sys.argv[1:5]
torch.set_num_threads(int(threads))
model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
rows = Dataset.from_parquet(data, cache_dir=cache).cast_column("image", Image())
names = rows.features["label"].names
classifier = HFCLIPClassifier(model, processor)
loader = DataLoader(CLIPDataset(rows, processor), batch_size=128, num_workers=8, shuffle=False)
class Pool(CLIPVisionModelTaskPool):
    def __init__(self): self.fast_dev_run = False
for _ in range(int(sys.argv[5])):
    sys.stdin.readline()
    began = time.perf_counter()
    classifier.set_classification_task(names, [lambda c: f"a photo of a {c}.", lambda c: f"a picture of the {c}."])
    result = Pool()._evaluate(classifier, loader, len(names), "bench")
    print(time.perf_counter() - began, round(result["accuracy"] * len(rows)), flush=True)
"""


def make_clip(folder: Path, count: int) -> list[Path]:
    """A CLIP in `folder/base` and `count` towers near its own; their paths."""
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    base = folder / "base"
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 32, "image_size": 224})
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.save_pretrained(base)
    CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[]).save_pretrained(base)
    CLIPImageProcessorPil().save_pretrained(base)
    paths: list[Path] = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tower = {
            f"vision_model.{name}": value + 1e-3 * torch.randn(value.shape, generator=generator)
            for name, value in model.vision_model.state_dict().items()
        }
        paths.append(folder / f"t{number}.safetensors")
        save_file(tower, paths[-1], {"format": "pt"})
    return paths


def make_images(folder: Path, count: int, width: int, height: int) -> Path:
    """A Parquet file of JPEG images: smooth colours with noise."""
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    files: list[dict[str, bytes]] = []
    for _ in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.clip(np.asarray(smooth, np.int16) + rng.integers(-8, 9, (height, width, 3)), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append({"bytes": buffer.getvalue()})
    known = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    kind = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        {"huggingface": json.dumps({"info": {"features": known}})},
    )
    table = pa.table({"image": files, "label": [n % len(CLASSES) for n in range(count)]}, schema=kind)
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / "test.parquet", row_group_size=100)
    return folder


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of all processors together."""
    began, used = time.perf_counter(), _processor_seconds()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, _processor_seconds() - used


def _processor_seconds() -> float:
    """Of this process and of the processes that it has started and seen end."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


Rates = dict[str, list[tuple[float, float | None]]]
"""What was done -> images per second on the clock and per second of processor, in each round."""


def measure(folder: Path, given: argparse.Namespace) -> Rates:
    """Does everything once in each round."""
    from mergecli.clip.model import load_clip
    from mergecli.data.tasks import TaskTable
    from mergecli.evaluation.evaluate import evaluate
    from mergecli.recipe.schema import Recipe
    from mergecli.storage.sources import parse_source

    towers = make_clip(folder, given.towers)
    data = make_images(folder / "data", given.images, *given.size)
    table = TaskTable(data=parse_source(str(data), Path()), templates=TEMPLATES)
    recipe = Recipe(
        base=parse_source(str(folder / "base"), Path()), tasks={"bench": table}, eval_tasks=("bench",)
    )
    clip = load_clip(folder / "base")
    clip.model.to(given.device)
    clip.tower.to(getattr(torch, given.dtype))
    clip.model.visual_projection.to(getattr(torch, given.dtype))
    size = min(128, given.images)
    batch = torch.randn(size, 3, 224, 224).to(given.device, getattr(torch, given.dtype))
    home = Path(os.environ["MERGECLI_HOME"])
    counts: dict[str, set[int]] = {}

    def bare() -> None:
        with torch.inference_mode():
            for start in range(0, given.images, size):
                features = clip.model(batch[: given.images - start])
        features.cpu()

    def ours(what: str, paths: list[Path], **more: object) -> None:
        results = evaluate(
            paths, recipe=recipe, device=given.device, dtype=given.dtype, workers=given.workers, **more
        )
        counts.setdefault(what, set()).add(results[0].tasks["bench"].correct)

    def one_by_one() -> None:
        from pyarrow import parquet
        from transformers import CLIPImageProcessorPil

        from mergecli.clip.heads import zero_shot_head
        from mergecli.data.decoding import EncodedImage, decoded

        processor: Any = CLIPImageProcessorPil.from_pretrained(folder / "base")
        zero_shot_head(clip, CLASSES, TEMPLATES)
        rows = parquet.read_table(data / "test.parquet")["image"]
        with torch.inference_mode():
            for start in range(0, given.images, size):
                stop = min(start + size, given.images)
                pictures = [decoded(EncodedImage(rows[row]["bytes"].as_py())) for row in range(start, stop)]
                values = [processor(images=each, return_tensors="pt")["pixel_values"] for each in pictures]
                made = torch.cat(values).to(batch.device, batch.dtype)
                features = clip.model(made)
        features.cpu()

    def decoded_anew() -> None:
        from mergecli.storage.cache import cache_path

        shutil.rmtree(cache_path("pixels", "any").parent)
        ours("decoded", towers[:1])

    works: dict[str, tuple[int, Callable[[], None]]] = {
        "bare forward pass": (1, bare),
        "eval, first time": (1, lambda: ours("first", towers[:1])),
        "eval, decoded anew, head in the cache": (1, decoded_anew),
        "eval, pixels in the cache": (1, lambda: ours("cached", towers[:1])),
        f"eval, {len(towers)} checkpoints, pixels in the cache": (
            len(towers),
            lambda: ours("several", towers),
        ),
        "eval --no-cache": (1, lambda: ours("without", towers[:1], cache=False)),
        "one image at a time through the processor": (1, one_by_one),
    }
    wanted = given.only.split(",") if given.only else [""]
    works = {
        what: work
        for number, (what, work) in enumerate(works.items())
        if not number or any(each in what for each in wanted)
    }
    found: Rates = {}
    other = _fusion_bench(folder, data, given) if given.peers else None
    ours("warm", towers[:1])
    for number in range(given.rounds):
        shutil.rmtree(home, ignore_errors=True)
        for what, (passes, work) in works.items():
            clock, processor = (passes * given.images / seconds for seconds in timed(work))
            found.setdefault(what, []).append((clock, processor))
            print(
                f"round {number + 1}: {what}: {clock:.1f} images/s, {processor:.1f} a processor second",
                file=sys.stderr,
            )
        if other is not None and other.stdin and other.stdout:
            other.stdin.write("go\n")
            other.stdin.flush()
            answer = other.stdout.readline().split()
            if not answer:
                print("FusionBench: failed", file=sys.stderr)
                other = None
                continue
            found.setdefault("FusionBench's loop", []).append((given.images / float(answer[0]), None))
            print(
                f"round {number + 1}: FusionBench: {given.images / float(answer[0]):.1f} images/s",
                file=sys.stderr,
            )
    if len(set().union(*counts.values())) > 1:
        print(f"the counts differ: {counts}", file=sys.stderr)
    return found


def _fusion_bench(folder: Path, data: Path, given: argparse.Namespace) -> subprocess.Popen[str]:
    """A process of the other environment that evaluates whenever a line comes."""
    arguments = [str(folder / "base"), str(data / "test.parquet"), str(folder / "converted")]
    return subprocess.Popen(
        [given.peers, "-W", "ignore", "-c", FUSION_BENCH, *arguments, str(torch.get_num_threads()), str(given.rounds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def main() -> None:
    """Measures, prints a Markdown table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=2, default=[400, 300], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--only", help="parts of the names of what is measured beside the bare forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--towers", type=int, default=3, help="checkpoints of the row with several")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--workers", type=int, help="processes that decode (default: as the program)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peers", help="the Python of an environment with fusion-bench")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MERGECLI_HOME"] = f"{temporary}/home"
        found = measure(Path(temporary), given)
    bare = found["bare forward pass"]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, device {given.device}, "
        f"{given.dtype}, torch {version('torch')} with {torch.get_num_threads()} threads, {given.images} images, "
        f"{given.rounds} rounds\n"
    )
    print(
        "| what | images/s | of the bare forward pass, in each round | images a processor second | of the bare |"
    )
    print("| :-- | --: | --: | --: | --: |")
    for what, rates in found.items():
        clocks, processors = [rate for rate, _ in rates], [rate for _, rate in rates if rate]
        ratios = [rate / base for rate, (base, _) in zip(clocks, bare, strict=False)]
        shares = [rate / base for rate, (_, base) in zip(processors, bare, strict=False) if base]
        print(
            f"| {what} | {statistics.median(clocks):.1f} | {', '.join(f'{100 * each:.0f}' for each in ratios)} % "
            f"| {statistics.median(processors):.1f} | {100 * statistics.median(shares):.1f} % |"
            if processors
            else f"| {what} | {statistics.median(clocks):.1f} | {', '.join(f'{100 * each:.0f}' for each in ratios)} % | | |"
        )
    if given.json:
        given.json.write_text(
            json.dumps(
                {"settings": {k: str(v) for k, v in vars(given).items()}, "images_per_second": found},
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
