"""Images a second of a vision tower on ready tensors, beside transformers' `CLIPVisionModel` with the same random weights.

    python scripts/bench_forward.py                       # ViT-B/32, quick-GELU, float32, 8 images at a time
    python scripts/bench_forward.py --model l14 --batch 4 --dtype bfloat16

Both take turns, in one process. With one thread seconds are those of the processor, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

SIZES = {
    "b32": (768, 3072, 12, 12, 32),
    "b16": (768, 3072, 12, 12, 16),
    "l14": (1024, 4096, 16, 24, 14),
    "h14": (1280, 5120, 16, 32, 14),
}


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    """Prints both rates, the ratio of the medians, the ratio of every round, and the largest difference of the features."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mergecli.clip.config import VisionConfig
    from mergecli.clip.network import VisionTower

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="b32")
    parser.add_argument("--activation", default="quick_gelu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    width, inner, heads, layers, patch = SIZES[given.model]
    sizes: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_hidden_layers": layers,
        "patch_size": patch, "image_size": 224, "hidden_act": given.activation,
    }  # fmt: skip
    torch.manual_seed(0)
    where = {"device": given.device, "dtype": getattr(torch, given.dtype)}
    theirs: Any = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    ours = VisionTower(VisionConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(**where), ours.to(**where)
    pixels = torch.randn(given.batch, 3, 224, 224).to(**where)
    works: list[Callable[[], Any]] = [lambda: theirs(pixel_values=pixels).pooler_output, lambda: ours(pixels)]
    with torch.inference_mode():
        one, other = (work() for work in works)
        rounds = [[seconds(work) for work in works] for _ in range(given.rounds)]
    before, after = (median(each) for each in zip(*rounds, strict=True))
    print(
        f"transformers {given.batch / before:.2f} images/s, mergecli {given.batch / after:.2f}: {before / after:.3f} x"
    )
    print("rounds", *(f"{theirs / ours:.3f}" for theirs, ours in rounds))
    print(
        f"largest difference {float((one - other).abs().max()):.1e} of features up to {float(one.abs().max()):.1f}"
    )


if __name__ == "__main__":
    main()
