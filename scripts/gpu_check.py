"""Checks everything that only a GPU can show, in at most five minutes, with a table at the end: `make gpu`.

    python scripts/gpu_check.py                      on the first GPU; without one it says so, and ends with status 0
    python scripts/gpu_check.py --device cpu         the same checks with fewer images on the CPU: tries this script alone

What must hold is tried on the toys, whose models are trained; time and memory are measured on random towers of the shape of
ViT-B/32. The status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_eval import make_clip, make_images
from safetensors.torch import load_file
from torch import distributed

import mergecli
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.memory import peak_memory

NONE = "gpu_check: torch {torch} sees no GPU on this machine, so nothing was checked; `--device cpu` tries the script itself"
TOYS = ("digits", "letters", "shapes")
RECIPE = """
base = "{folder}/base"

[tuned]
{tuned}

[tasks]
{tasks}
"""


class Found(NamedTuple):
    """What a check has found."""

    text: str
    holds: bool | None = None
    """None where it only measures."""


class Row(NamedTuple):
    """A row of the table."""

    check: str
    expected: str
    found: str
    verdict: str
    seconds: str
    memory: str


class Bench:
    """What the checks share: a device, a folder, the toys, and towers of the shape of ViT-B/32 with images."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device, self.small = folder, device, device == "cpu"
        self.images, self.towers, self.batch = (8, 2, 2) if self.small else (4096, 8, 16)
        self.toys = folder / "toys.toml"
        self.big = folder / "big.toml"
        self.paths: list[Path] = []

    def prepare(self) -> Found:
        """Makes everything that the other checks read."""
        tuned = "\n".join(f'{name} = "toy:{name}"' for name in TOYS)
        self.toys.write_text(f'base = "toy:base"\n\n[tuned]\n{tuned}\n')
        self.paths = make_clip(self.folder, self.towers)
        data = make_images(self.folder / "data", self.images)
        shutil.copy(data / "test.parquet", data / "train.parquet")
        task = f'{{data = "{data}", templates = ["a photo of a {{}}."]}}'
        self.big.write_text(
            RECIPE.format(
                folder=self.folder,
                tuned="\n".join(f't{number} = "{path}"' for number, path in enumerate(self.paths)),
                tasks="\n".join(f"t{number} = {task}" for number in range(self.towers)),
            )
        )
        return Found(f"{self.towers} towers, {self.images:,} images")

    def marked_tests(self) -> Found:
        """The tests of the repository that are marked so."""
        root = Path(__file__).parents[1]
        files = [str(file) for file in root.glob("tests/**/test_*.py") if "mark.gpu" in file.read_text()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", *files],
            cwd=root,
            env={**os.environ, "MERGECLI_TEST_DEVICE": self.device, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-80:]])[-1].strip("= ")
        if done.returncode:
            print(done.stdout[-3000:], file=sys.stderr)
        return Found(last, done.returncode == 0 and "skipped" not in last)

    def merge(self, method: str, tolerance: float) -> Found:
        """A merge of the large towers here and on the CPU: the norm of the difference beside that of the merged task vector."""
        models = {path.stem: path for path in self.paths[:4]}
        made, took = [], []
        for device in ("cpu", self.device):
            output = self.folder / f"{method}-{device.replace(':', '-')}.safetensors"
            began = time.perf_counter()
            mergecli.merge(models, base=self.folder / "base", method=method, output=output, device=device)
            took.append(time.perf_counter() - began)
            made.append(load_file(output))
        base = load_file(self.folder / "base" / "model.safetensors")
        cpu, here = made
        apart = sum(float((cpu[name] - here[name]).double().square().sum()) for name in cpu) ** 0.5
        whole = sum(float((cpu[name] - base[name]).double().square().sum()) for name in cpu) ** 0.5
        return Found(
            f"{apart / whole:.1e}; {took[0]:.1f} s on cpu, {took[1]:.1f} s here", apart <= tolerance * whole
        )

    def counts(self, precision: str, tolerance: int) -> Found:
        """Correct answers of the toys here and in float32 on the CPU."""
        limit = 64 if self.small else None
        given: dict[str, Any] = {"recipe": self.toys, "tasks": TOYS, "limit": limit, "cache": False}
        (cpu,) = mergecli.evaluate("toy:digits", **given)
        (here,) = mergecli.evaluate("toy:digits", **given, device=self.device, dtype=precision)
        apart = [abs(cpu.tasks[name].correct - here.tasks[name].correct) for name in TOYS]
        images = sum(cpu.tasks[name].images for name in TOYS)
        return Found(f"{', '.join(map(str, apart))} of {images:,}", max(apart) <= tolerance)

    def speed(self, precision: str) -> Found:
        """Images a second of an evaluation whose pixels are in the cache, beside the bare forward pass."""
        from mergecli.clip.model import load_clip

        clip = load_clip(self.folder / "base")
        clip.model.to(self.device)
        clip.tower.to(getattr(torch, precision))
        clip.model.visual_projection.to(getattr(torch, precision))
        size = min(128, self.images)
        batch = torch.randn(size, 3, 224, 224).to(self.device, getattr(torch, precision))

        def bare(images: int) -> None:
            with torch.inference_mode():
                for _ in range(0, images, size):
                    clip.model(batch)
            self._wait()

        def ours(limit: int) -> None:
            mergecli.evaluate(
                self.paths[0],
                recipe=self.big,
                tasks="t0",
                limit=limit,
                device=self.device,
                dtype=precision,
                fresh=True,
            )

        few = self.images // 8
        for images in (few, self.images):
            ours(images)  # decodes, and warms up
        bare(size)
        floor = self._seconds(lambda: bare(self.images))
        took = self._seconds(lambda: ours(self.images)) - self._seconds(lambda: ours(few))
        rate, most = (self.images - few) / max(took, 1e-9), self.images / floor
        return Found(f"{rate:,.0f} of {most:,.0f} images/s, {100 * rate / most:.0f} %")

    def adapt(self) -> Found:
        """AdaMerging's coefficients on the toys after two steps, here and on the CPU."""
        learned = []
        for device in ("cpu", self.device):
            self._forget()
            file = self.folder / f"toys-{device.replace(':', '-')}.safetensors"
            mergecli.merge(
                self.toys,
                method="ada_merging",
                settings={"steps": 2},
                device=device,
                output=file.with_name(f"merged-{file.name}"),
                save_coefficients=file,
            )
            learned.append(load_file(file))
        return self._close(*learned)

    def _close(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Found:
        """Whether coefficients are the same but for the few whose gradient vanishes: there Adam's steps follow its rounding error."""
        apart = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
        share = float((apart > 1e-4).float().mean())
        text = f"{100 * share:.1f} % of {len(apart)} differ by more than 1e-4, at most {apart.max():.1e}"
        return Found(text, share <= 0.02)

    def adapt_memory(self, where: str | None) -> Found:
        """Seconds a step of layer-wise AdaMerging on the large towers; the table has the memory."""

        def merge(steps: int) -> None:
            self._forget()
            settings: dict[str, Any] = {"steps": steps, "batch_size": self.batch}
            mergecli.merge(
                self.big,
                method="ada_merging",
                settings=settings | ({"vectors_on": where} if where else {}),
                device=self.device,
                output=self.folder / "adapted.safetensors",
                save_coefficients=self.folder / f"adapted-{where}-{steps}.safetensors",
            )

        few, many = (1, 2) if self.small else (2, 12)
        more = self._seconds(lambda: merge(few))
        step = (self._seconds(lambda: merge(many)) - more) / (many - few)
        text = f"{step:.2f} s a step, {self.towers} tasks x {self.batch} images"
        if not where:
            return Found(text)
        first, second = (
            load_file(self.folder / f"adapted-{each}-{few}.safetensors") for each in (None, where)
        )
        found = self._close(first, second)
        return Found(f"{text}; {found.text}", found.holds)

    def finetune(self, precision: str) -> Found:
        """Losses of a training on a toy here, beside those in float32 on the CPU."""
        losses = []
        for device, computed in (("cpu", "float32"), (self.device, precision)):
            name = self.folder / f"tuned-{device.replace(':', '-')}-{computed}-{precision}"
            mergecli.finetune(
                self.toys,
                task="digits",
                steps=10,
                learning_rate=1e-4,
                precision=computed,
                device=device,
                output=name.with_suffix(".safetensors"),
                trace=name.with_suffix(".csv"),
            )
            with name.with_suffix(".csv").open() as file:
                rows = list(csv.DictReader(file))
            losses.append([float(row[next(key for key in row if "loss" in key)]) for row in rows])
        apart = max(abs(one - other) / one for one, other in zip(*losses, strict=True))
        return Found(
            f"{100 * apart:.2f} % apart at most", apart <= (0.05 if precision == "bfloat16" else 1e-3)
        )

    def finetune_speed(self) -> Found:
        """Seconds a step of a training of the large tower in bfloat16; the table has the memory."""

        def train(steps: int) -> None:
            mergecli.finetune(
                self.big,
                task="t0",
                steps=steps,
                precision="bfloat16",
                device=self.device,
                batch_size=self.batch,
                output=self.folder / f"big-{steps}.safetensors",
            )

        few, many = (1, 2) if self.small else (5, 55)
        more = self._seconds(lambda: train(few))
        step = (self._seconds(lambda: train(many)) - more) / (many - few)
        return Found(f"{step:.3f} s a step of {self.batch} images")

    def one_rank(self) -> Found:
        """What the processes of `torchrun` use, in a group of one."""
        backend = "gloo" if self.small else "nccl"
        distributed.init_process_group(
            backend, init_method=f"file://{self.folder}/ranks", world_size=1, rank=0
        )
        try:
            sent = torch.randn(1000, device=self.device)
            got = [torch.empty_like(sent)]
            distributed.all_gather(got, sent)
            distributed.broadcast(sent, 0)
            self._wait()
            return Found(f"{backend}: the same values", bool(torch.equal(got[0], sent)))
        finally:
            distributed.destroy_process_group()

    def processes(self) -> Found:
        """Units in processes of their own, a process each GPU, and the results of this one."""
        given: dict[str, Any] = {"recipe": self.toys, "tasks": TOYS, "limit": 64, "cache": False}
        engine = Engine(jobs=2) if self.small else Engine(gpus="all")
        for name, how in (("one", None), ("several", engine)):
            mergecli.evaluate(
                ["toy:base", "toy:digits"],
                **given,
                device=self.device,
                output=self.folder / name,
                engine=how,
            )
        files = {file.name: file.read_bytes() for file in (self.folder / "one").glob("*.json")}
        same = {file.name: file.read_bytes() for file in (self.folder / "several").glob("*.json")} == files
        count = 2 if self.small else torch.cuda.device_count()
        return Found(f"{count} processes: {'the same' if same else 'other'} bytes", same and len(files) == 2)

    def _forget(self) -> None:
        """Begins an empty store: what is kept there may have been learned on another device."""
        os.environ["MERGECLI_HOME"] = tempfile.mkdtemp(dir=self.folder)

    def _seconds(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if not self.small:
            torch.cuda.synchronize(self.device)


def checks(bench: Bench) -> list[tuple[str, str, Callable[[], Found]]]:
    """What is checked, what is expected, and the check."""
    merges = {"task_arithmetic": 1e-4, "ties": 1e-3}
    if not bench.small:
        # an SVD of noise has close singular values, whose vectors rounding turns
        merges |= {"tsv_m": 1e-2, "iso_c": 1e-2}
    return [
        ("inputs", "", bench.prepare),
        ("tests marked `gpu`", "all pass", bench.marked_tests),
        *(
            (f"merge, `{name}`", f"within {most:.0e} of the CPU's", lambda name=name, most=most: bench.merge(name, most))
            for name, most in merges.items()
        ),
        ("evaluation, float32", "the CPU's counts but 1", lambda: bench.counts("float32", 1)),
        ("evaluation, bfloat16", "the CPU's counts but 1 %", lambda: bench.counts("bfloat16", 10)),
        ("AdaMerging, two steps", "the CPU's coefficients", bench.adapt),
        ("finetune, float32", "losses within 0.1 %", lambda: bench.finetune("float32")),
        ("finetune, bfloat16", "losses within 5 %", lambda: bench.finetune("bfloat16")),
        ("one rank", "what was sent", bench.one_rank),
        ("a process for each GPU", "the bytes of one process", bench.processes),
        ("AdaMerging, ViT-B/32", "", lambda: bench.adapt_memory(None)),
        ('the same with `vectors_on = "cpu"`', "the same coefficients", lambda: bench.adapt_memory("cpu")),
        ("finetune, ViT-B/32, bfloat16", "", bench.finetune_speed),
        ("speed, float32", "beside the bare forward pass", lambda: bench.speed("float32")),
        ("speed, bfloat16", "beside the bare forward pass", lambda: bench.speed("bfloat16")),
    ]  # fmt: skip


def run(bench: Bench, budget: float) -> list[Row]:
    """The rows of all checks; one that fails does not end the others, and none begins when the time is up."""
    rows: list[Row] = []
    start = time.perf_counter()
    for name, expected, check in checks(bench):
        began = time.perf_counter()
        if began - start > budget:
            rows.append(Row(name, expected, "not begun: the time is up", "FAILED", "", ""))
            continue
        if not bench.small:
            torch.cuda.reset_peak_memory_stats(bench.device)
        try:
            found = check()
        except Exception as error:  # noqa: BLE001  a row says so
            traceback.print_exc()
            found = Found(f"{type(error).__name__}: {error}".splitlines()[0][:80], False)
        most = peak_memory() if bench.small else torch.cuda.max_memory_allocated(bench.device)
        verdict = {None: "", True: "ok", False: "FAILED"}[found.holds]
        took = time.perf_counter() - began
        rows.append(Row(name, expected, found.text, verdict, f"{took:.1f}", f"{most / 1e9:.2f}"))
        print(f"{name}: {found.text} {verdict} ({took:.1f} s)", file=sys.stderr, flush=True)
    return rows


def table(rows: list[Row], device: str) -> str:
    """The rows in Markdown."""
    memory = "most GB of main memory so far" if device == "cpu" else "most GB of the GPU"
    cells = [("check", "expected", "found", "", "seconds", memory), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = (
        "|"
        + "|".join(f"-{'-' * width}{':' if column > 3 else '-'}" for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def main() -> None:
    """Runs all checks and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; or cpu to try the script")
    parser.add_argument(
        "--seconds", type=float, default=240, help="after which no check begins (default: 240)"
    )
    given = parser.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        print(NONE.format(torch=version("torch")), file=sys.stderr)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MERGECLI_HOME"] = f"{temporary}/home"
        rows = run(Bench(Path(temporary), given.device), given.seconds)
    what = "the CPU: this tries the script, not a GPU" if given.device == "cpu" else (
        f"{torch.cuda.get_device_name(given.device)}, CUDA {torch.version.cuda}"
    )  # fmt: skip
    print(f"{what}; torch {version('torch')}, mergecli {version('mergecli')}\n\n{table(rows, given.device)}")
    if any(row.verdict == "FAILED" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
