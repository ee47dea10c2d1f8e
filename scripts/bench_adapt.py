"""Times steps of the adapted methods on random towers of the shape of ViT-B/32, beside the bare forward and backward of the
same tasks' batches one after another, in turn in the same process; and the most memory that it took.

    python scripts/bench_adapt.py                                          layer-wise AdaMerging, 8 tasks, 16 images each
    python scripts/bench_adapt.py --set batch_size=2 --set vectors=bfloat16
    python scripts/bench_adapt.py --method concrete_ada_merging --steps 2
    python scripts/bench_adapt.py --peers other-env/bin/python             with FusionBench's layer-wise AdaMerging beside
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

TASKS = ("digits", "letters", "shapes", "textures", "arrows", "colours", "positions", "faces")
FUSION_BENCH = """
import copy, sys, time, resource, torch
from transformers import CLIPModel
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
folder, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
base = CLIPModel.from_pretrained(folder + "/base", dtype=torch.float32).vision_model
tuned = []
for i in range(8):
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1e-3 * torch.randn_like(p))
    tuned.append(model)
count = len(list(base.parameters()))
merged = LayerWiseMergedModel(
    layer_wise_weight=torch.full((8, count), 0.3), pretrained_model=base, finetuned_models=tuned,
    clamp_weights=False, tie_weights=True, strict=False)
optimizer = torch.optim.Adam([merged.merge_weight], lr=1e-3)
head = torch.randn(768, 10) / 27
pixels = [torch.randn(size, 3, 224, 224) for _ in range(8)]
for _ in range(steps):
    begun = time.perf_counter()
    merged.merge_weights()
    for each in pixels:
        chances = (merged(each).pooler_output @ head).softmax(1)
        (-(chances * (chances + 1e-8).log()).sum(1).mean()).backward(retain_graph=True)
    optimizer.step(); optimizer.zero_grad()
    print(f"FusionBench step {time.perf_counter() - begun:.2f} s, "
          f"max RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)
"""


def make(folder: Path) -> None:
    """A random CLIP with ViT-B/32's towers, and eight towers near its own."""
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    torch.manual_seed(0)
    marks = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    model = CLIPModel(CLIPConfig(text_config={"vocab_size": 514, **marks}))
    model.save_pretrained(folder / "base")
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / "base")
    CLIPImageProcessorPil().save_pretrained(folder / "base")
    base = {f"vision_model.{name}": each for name, each in model.vision_model.state_dict().items()}
    for name in TASKS:
        save_file(
            {key: each + 1e-3 * torch.randn_like(each) for key, each in base.items()},
            folder / f"{name}.safetensors",
        )


def bare(objective: Any, size: int) -> Callable[[int], None]:
    """The tasks' batches through the tower one after another, forward and backward, and nothing else."""
    from mergecli.clip.model import features
    from mergecli.methods._adapted import entropy

    clip = objective._clip

    def run(batch: int) -> None:
        for each in clip.tower.parameters():
            each.grad = None
        with torch.enable_grad():
            for each in objective._batches:
                pixels = objective._normalized(each.pixels.rows(each.rows(batch, size, 0)))
                image = features(clip, pixels)
                image = clip.model.logit_scale.exp() * image / image.norm(dim=-1, keepdim=True)
                entropy(image @ each.head.T).backward()

    return run


def measure(folder: Path, name: str, changes: list[str], steps: int, alone: bool) -> None:
    """Prints a line for each step: seconds of it, and of the bare passes."""
    from mergecli.merging.learning.objective import tower_objective
    from mergecli.merging.learning.work import LearningWork
    from mergecli.merging.merge_target import MergeTarget
    from mergecli.merging.models import open_models
    from mergecli.recipe.reading import recipe_of
    from mergecli.runtime.distributed import Ranks

    sources = {task: folder / f"{task}.safetensors" for task in TASKS}
    recipe = recipe_of(
        sources, base=folder / "base", method=name, changes=[f"method.{each}" for each in changes]
    )
    target = MergeTarget.of(recipe, folder / "merged.safetensors")
    with ExitStack() as stack, torch.no_grad():
        models = open_models(recipe, stack, needs="base")
        method: Any = target.method
        work = LearningWork.of(models, method, recipe, {})
        begun = time.perf_counter()
        objective = tower_objective(work, method, {}, Ranks(), "cpu")
        tower = 4 * models.size / 1e9
        print(f"made ready in {time.perf_counter() - begun:.1f} s; a tower has {tower:.3f} GB")
        state = method.begin(objective)
        plain = bare(objective, method.batch_size)
        for number in range(steps):
            floor = (0.0, 0.0) if alone else timed(lambda at=number: plain(at))
            took = timed(lambda at=number: method.step(objective, state, at)[1]())
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            against = ""
            if not alone:
                against = (
                    f"; bare {floor[0]:.2f} s, {floor[1]:.2f} of the processor; {took[0] / floor[0]:.2f} and"
                    f" {took[1] / floor[1]:.2f} times"
                )
            print(
                f"{name} step {took[0]:.2f} s, {took[1]:.2f} of the processor{against}; max RSS {rss:.2f} GB ="
                f" {rss / tower:.1f} towers",
                flush=True,
            )


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor, which others at work on the same machine change less."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Makes the towers if they are missing, and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the towers are made and kept (default: a temporary one)"
    )
    parser.add_argument("--method", default="ada_merging")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without the bare passes")
    parser.add_argument("--peers", help="the Python of an environment with fusion-bench")
    parser.add_argument("--child", choices=["make", "measure"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child == "make":
        make(given.folder)
        return
    if given.child == "measure":
        measure(given.folder, given.method, given.set, given.steps, given.alone)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        environment = {"MERGECLI_HOME": str(folder / "home"), **os.environ}
        again = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--child"]
        if not (folder / f"{TASKS[-1]}.safetensors").exists():
            subprocess.run([*again, "make"], check=True)
        subprocess.run([*again, "measure"], check=True, env=environment)
        if given.peers:
            size = next(
                (each.partition("=")[2] for each in given.set if each.startswith("batch_size=")), "16"
            )
            subprocess.run([given.peers, "-c", FUSION_BENCH, str(folder), size, str(given.steps)], check=True)


if __name__ == "__main__":
    main()
