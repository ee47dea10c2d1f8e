"""Forward passes of towers that route, on ViT-B/32 shapes with random weights and eight tasks: time and memory.

    python scripts/bench_routed.py                            # each in a process of its own; ratios to the plain tower of the same run
    python scripts/bench_routed.py --only esm_plus_plus,smile

`loop` is WEMoE as a plain loop over the images, each layer's weights added up for one image after another.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TASKS = tuple(f"t{number}" for number in range(8))
KINDS = ("plain", "loop", "weight_ensembling_moe", "weight_ensembling_moe batch", "efficient_weight_ensembling_moe",
         "efficient_weight_ensembling_moe batch", "smile", "esm_plus_plus")  # fmt: skip
PREFIX = "vision_model."


def tower(patch: int) -> Any:
    """A ViT-B with random weights."""
    from mergecli.clip.config import VisionConfig
    from mergecli.clip.network import VisionTower

    torch.manual_seed(0)
    model = VisionTower(VisionConfig(patch_size=patch)).float()
    torch.nn.init.normal_(model.embeddings.class_embedding)
    return model.eval().requires_grad_(False)


def reader(method: Any, model: Any) -> Callable[[str], Tensor]:
    """Random tensors of a mixture's file, made when they are asked for."""
    shapes = {PREFIX + name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {
        key: part
        for name, shape in shapes.items()
        for key, part in method.parts(name, shape, len(TASKS)).items()
    }
    wanted |= method.extras(shapes, len(TASKS))

    def read(key: str) -> Tensor:
        part = wanted[key]
        name = key.removeprefix("masks.").removeprefix("experts.")
        if key == name or f"masks.{name}" not in wanted:
            return 1e-2 * torch.randn(part.shape)
        from mergecli.methods._bitmasks import pack

        torch.manual_seed(zlib.crc32(name.encode()))  # the bits and the values of the same task vectors
        room = wanted[f"experts.{name}"].shape[1]
        mask = torch.rand(len(TASKS), torch.Size(shapes[name]).numel()) < method.density
        mask &= mask.cumsum(1) <= room
        kept = torch.arange(room) < mask.sum(1, keepdim=True)
        return pack(mask) if key.startswith("masks.") else 1e-2 * torch.randn(kept.shape) * kept

    return read


def looped(handle: Any) -> None:
    """Makes every routed layer add up its weights for one image after another."""
    from torch.nn.functional import linear

    for layer in handle.layers.values():

        def forward(hidden: Tensor, layer: Any = layer) -> Tensor:
            results: list[Tensor] = []
            for tokens, share in zip(hidden, layer.router(hidden), strict=True):
                for name in ("fc1", "fc2"):
                    own: Any = getattr(layer.mlp, name)
                    weight, bias = own.weight.clone(), own.bias.clone()
                    for place, factor in enumerate(share):
                        weight += factor * layer.get_submodule(f"{name}_experts").values[place]
                        bias += factor * layer.get_buffer(f"{name}_offsets")[place]
                    tokens = linear(tokens, weight, bias)
                    tokens = layer.mlp.activation_fn(tokens) if name == "fc1" else tokens
                results.append(tokens)
            return torch.stack(results)

        layer.forward = forward


def one(kind: str, batch: int, patch: int) -> dict[str, float]:
    """Seconds of the fastest of three forward passes, and max RSS in GB."""
    from mergecli import methods

    model = tower(patch)
    name, _, routing = kind.partition(" ")
    if kind != "plain":
        method: Any = methods.create("weight_ensembling_moe" if kind == "loop" else name, {})
        handle = method.install(model, reader(method, model), TASKS, routing or "sample", PREFIX)
        if kind == "loop":
            looped(handle)
    pixels, best = torch.randn(batch, 3, 224, 224), float("inf")
    with torch.inference_mode():
        for _ in range(4):
            began = clock()
            model(pixel_values=pixels)
            best = min(best, clock() - began)
    return {"seconds": best, "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def clock() -> float:
    """Seconds; of processor where there is one thread, which other programs disturb less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def main() -> None:
    """All kinds, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--patch", type=int, default=32, help="16 for ViT-B/16")
    parser.add_argument("--only", help="these kinds, with commas between, beside the plain tower")
    parser.add_argument("--one", choices=KINDS, help="only this, as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.batch, given.patch)))
        return
    plain = 0.0
    for kind in KINDS if given.only is None else ("plain", *given.only.split(",")):
        more = ["--one", kind, "--batch", str(given.batch), "--patch", str(given.patch)]
        done = subprocess.run([sys.executable, __file__, *more], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        plain = plain or found["seconds"]
        print(
            f"{kind:40} {found['seconds']:7.2f} s {found['seconds'] / plain:6.2f} x {found['gigabytes']:6.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
