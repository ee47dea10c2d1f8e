"""Builds the toy zoo that ships in `mergecli/data/toy/models`: pre-trains the base, fine-tunes eight towers, checks them.

    python scripts/build_toy.py base        # about forty minutes on two idle cores; resumes from --work
    python scripts/build_toy.py strengths   # what the base makes of each task, its look weaker and stronger
    python scripts/build_toy.py towers      # with `mergecli.finetune`
    python scripts/build_toy.py check       # the table of merges, and what must be true of it

What the zoo is built for: its base is right on about half of the images of every task, and each tower on nearly all images of
its own, and their task vectors are long enough that a part of one does much of its work. So methods can differ on it as they do on
published checkpoints. How looks, steps and learning rate were chosen: `docs/experiments/toys.md`.

The shipped base does not come out of one run of this script: it was trained for about 6,260 steps in five pieces, over two
pools of images (the first with fewer arrows and positions), the last 1,600 steps with half of all images in batches of
a single kind, which is what taught it left from right; `base` now does that from the start, and learns other merges
of the tokenizer. The towers come out of `towers` as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from toy_captions import compose, kind_of
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

import mergecli
from mergecli.clip.heads import logits, zero_shot_head
from mergecli.clip.model import load_clip
from mergecli.data.toy import TASKS
from mergecli.data.toy.drawing import draw

MODELS = Path(__file__).parent.parent / "mergecli" / "data" / "toy" / "models"
MEAN, SPREAD = (0.5, 0.45, 0.45), (0.32, 0.3, 0.3)
START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 24
log = logging.getLogger("build_toy")


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for the bytes, in the order of CLIP's own vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: Counter[str], most: int) -> list[tuple[str, str]]:
    """Byte-pair merges of the words, most frequent pair first, until each is one token or `most` are found."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in spelled.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            spelled[word] = joined
    return merges


def write_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and the words of the captions, saved in the folder with all its files."""
    merges = learn_merges(Counter(word for caption in captions for word in caption.split()), 480)
    letters = byte_letters()
    entries = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocab = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=POSITIONS)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tokenizer


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 0.8 M parameters in its tower and 0.3 M in its text half, with random weights."""
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=POSITIONS,
        projection_dim=64,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu",
        image_size=32,
        patch_size=4,
        projection_dim=64,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


def pixels(images: np.ndarray) -> Tensor:
    """(B, 3, 32, 32) normalised pixels of (B, 32, 32, 3) bytes, as the image processor makes them."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(SPREAD)[:, None, None]


def captioned(count: int, work: Path) -> tuple[np.ndarray, list[str]]:
    """(count, 32, 32, 3) bytes and their captions, drawn once and kept under `work`."""
    images_at, captions_at = work / f"images-{count}.npy", work / f"captions-{count}.txt"
    if not captions_at.exists():
        images = np.empty((count, 32, 32, 3), np.uint8)
        captions: list[str] = []
        for index in range(count):
            canvas, caption = compose(index)
            images[index] = np.round(canvas * 255)
            captions.append(caption)
        np.save(images_at, images)
        captions_at.write_text("\n".join(captions), encoding="utf-8")
    return np.load(images_at), captions_at.read_text(encoding="utf-8").split("\n")


def batches(kinds: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The epoch's batches of picture numbers, shuffled; half of the pictures come in batches of one kind.

    Why: told apart from letters and faces, an arrow to the left and one to the right are nearly the same, and a
    model whose batches are all mixed gives both one meaning and stays there.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(kinds))
    alone = rng.random(len(kinds)) < 0.5
    parts = [order[alone & (kinds[order] == kind)] for kind in np.unique(kinds)] + [order[~alone]]
    cut = [part[at : at + size] for part in parts for at in range(0, len(part) - size + 1, size)]
    return [cut[place] for place in rng.permutation(len(cut))]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, caption: Tensor) -> Tensor:
    """CLIP's symmetric loss of (B, D) features, where equal captions share the target."""
    logits = scale * image @ text.T  # (B, B)
    same = (caption[:, None] == caption[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    by_image = cross_entropy(logits, target)
    return (by_image + cross_entropy(logits.T, target)) / 2


def pretrain(options: argparse.Namespace) -> None:
    """Trains the base contrastively and saves it; a checkpoint every few minutes, from which a next run resumes."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    images, captions = captioned(options.images, work)
    folder = MODELS / "base"
    checkpoint = work / "checkpoint.pt"
    known = checkpoint.exists() and (folder / "vocab.json").exists()
    tokenizer = CLIPTokenizer.from_pretrained(folder) if known else write_tokenizer(captions, folder)
    unique = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    tokens = tokenizer(list(unique), padding=True, return_tensors="pt")["input_ids"]
    numbers = torch.tensor([unique[caption] for caption in captions])
    log.info("%d images, %d captions, %d tokens at most", len(images), len(unique), tokens.shape[1])

    torch.manual_seed(options.seed)
    model = new_model(tokenizer)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))

    def pace(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / options.steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)  # noqa: TID251 - written by this script
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    kinds = np.array([kind_of(index) for index in range(len(images))])
    began = saved = time.monotonic()
    running, epoch, queue = 0.0, first, list[np.ndarray]()
    for step in range(first, options.steps):
        if not queue:
            queue, epoch = batches(kinds, options.batch_size, options.seed, epoch), epoch + 1
        chosen = queue.pop()
        caption = numbers[chosen]
        seen = model.visual_projection(model.vision_model(pixels(images[chosen])).pooler_output)
        read = model.text_projection(model.text_model(tokens[caption]).pooler_output)
        loss = contrastive_loss(normalize(seen), normalize(read), model.logit_scale.exp(), caption)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            pace_now = (time.monotonic() - began) / (step + 1 - first)
            log.info("step %d loss %.3f, %.3f s a step", step + 1, running, pace_now)
        if time.monotonic() - saved > 120 or step + 1 == options.steps:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"schedule": schedule.state_dict(), "step": step + 1}, work / "checkpoint.new")
            (work / "checkpoint.new").replace(checkpoint)
    save_base(model, folder)


def save_base(model: CLIPModel, folder: Path) -> None:
    """Writes the model's float16 weights, its configuration and its image processor beside the tokenizer."""
    model.half().save_pretrained(folder)
    settings = {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": SPREAD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)


def show_strengths(options: argparse.Namespace) -> None:
    """Prints the accuracy of the base on every task whose look is weaker and stronger, on validation images."""
    clip = load_clip(MODELS / "base")
    for name, task in TASKS.items():
        head = zero_shot_head(clip, task.classes, task.templates)
        line = name
        for strength in (0, 0.8, 0.9, 1, 1.05):
            drawn = [draw(name, "train", task.train + index, strength) for index in range(options.images)]
            shown = pixels(np.stack([np.asarray(image) for image, _ in drawn]))
            with torch.inference_mode():
                found = logits(clip, head, shown).argmax(1).tolist()
            right = sum(each == label for each, (_, label) in zip(found, drawn, strict=True))
            line += f"  {strength:.2f}: {100 * right / len(drawn):.0f}"
        print(line, flush=True)


def build_towers(options: argparse.Namespace) -> None:
    """Fine-tunes the base on every task with `mergecli.finetune`, two at a time, each on one thread."""
    names = [name for name in TASKS if not options.task or name in options.task]
    work = partial(build_tower, options)
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for line in pool.map(work, names):
            log.info(line)


def build_tower(options: argparse.Namespace, name: str) -> str:
    """Writes one task's tower; a line about it."""
    done = mergecli.finetune(
        task=name, base="toy:base", output=MODELS / name, steps=options.steps, batch_size=options.batch_size,
        learning_rate=options.learning_rate, warmup=options.warmup, epsilon=options.epsilon,
        seed=options.seed, dtype="float16",
    )  # fmt: skip
    return f"{name}: loss {done.loss:.3f}, {done.images_per_second:.0f} images/s"


def check(_: argparse.Namespace) -> None:
    """Prints the table of all merges, and fails where the zoo departs from what it promises."""
    recipe = MODELS.parents[3] / "recipes" / "toy.toml"
    families: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        towers: dict[str, Path] = {}
        for method in ("average", "task_arithmetic", "ties"):
            scales = [None] if method == "average" else [tenth / 10 for tenth in range(1, 11)]
            for scale in scales:
                name = method if scale is None else f"{method}-{scale}"
                families.setdefault(method, []).append(name)
                settings = {} if scale is None else {"scaling_factor": scale}
                towers[name] = Path(folder) / f"{name}.safetensors"
                mergecli.merge(recipe, method=method, settings=settings, output=towers[name])
        base, *merged = mergecli.evaluate({"base": "toy:base", **towers}, recipe=recipe)
    (tuned,) = mergecli.evaluate(individual=True, recipe=recipe)
    print(mergecli.report([base, *merged, tuned]).text("md"))
    results = {result.name: result for result in merged}
    gain = tuned.average.accuracy - base.average.accuracy
    recovered = {
        name: (each.average.accuracy - base.average.accuracy) / gain for name, each in results.items()
    }
    best: dict[str, tuple[float, float]] = {}
    for names in families.values():
        winner = max((results[name] for name in names), key=lambda result: result.average.accuracy)
        share = recovered[winner.name]
        worst = min(winner.tasks[task].accuracy - base.tasks[task].accuracy for task in TASKS)
        best[winner.name] = share, worst
        print(
            f"{winner.name}: recovers {share:.0%} of {100 * gain:.1f} points; worst task {100 * worst:+.1f}"
        )
    worst = max(best.values())[1]
    size = sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {MODELS.name}")
    promises = {
        "the base's mean lies between 40 and 55 %": 0.40 <= base.average.accuracy <= 0.55,
        "no task of the base lies outside of 35 to 75 %": all(
            0.35 <= score.accuracy <= 0.75 for score in base.tasks.values()
        ),
        "fine-tuned models are right on 92 %": tuned.average.accuracy >= 0.92,
        "average and task arithmetic recover 30 to 55 % of that": all(
            0.30 <= recovered[name] <= 0.55 for name in ("average", "task_arithmetic-0.3")
        ),
        "the best merge ruins no task": worst >= -0.02,
        "16 MB at most": size <= 16e6,
    }
    if broken := [promise for promise, kept in promises.items() if not kept]:
        raise SystemExit("not so: " + "; ".join(broken))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    base = stages.add_parser("base", help="pre-train the base")
    base.add_argument("--images", type=int, default=100_000)
    base.add_argument("--steps", type=int, default=4500)
    base.add_argument("--batch-size", type=int, default=128)
    base.add_argument("--learning-rate", type=float, default=1e-3)
    base.add_argument("--seed", type=int, default=0)
    base.add_argument(
        "--work", type=Path, default=Path("build/toy"), help="folder of drawn images and checkpoints"
    )
    base.set_defaults(run=pretrain)
    strengths = stages.add_parser("strengths", help="show what the base makes of each task")
    strengths.add_argument("--images", type=int, default=208, help="of each task and strength")
    strengths.set_defaults(run=show_strengths)
    towers = stages.add_parser("towers", help="fine-tune the base on each task")
    towers.add_argument("--task", action="append", help="only this task; may be repeated")
    towers.add_argument("--steps", type=int, default=110)
    towers.add_argument("--batch-size", type=int, default=32)
    towers.add_argument("--learning-rate", type=float, default=9e-4)
    towers.add_argument("--warmup", type=int, default=30)
    towers.add_argument("--epsilon", type=float, default=1e-2)
    towers.add_argument("--seed", type=int, default=0)
    towers.set_defaults(run=build_towers)
    stages.add_parser("check", help="print the table and check what the zoo promises").set_defaults(run=check)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    options.run(options)


if __name__ == "__main__":
    main()
