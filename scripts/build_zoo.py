"""Builds the zoo of real images: pre-trains a base of 4.8 M parameters, fine-tunes eight experts, makes a table of merges.

    MERGECLI_TEST_DATA=path/to/tasks python scripts/build_zoo.py              # all stages; two to three hours on one core
    python scripts/build_zoo.py base          # pre-trains, from the last checkpoint
    python scripts/build_zoo.py experts       # with `mergecli.finetune`
    python scripts/build_zoo.py check         # the table of merges, and what must be true of the zoo

MERGECLI_TEST_DATA has a folder of Parquet files for each task. Everything goes to `build/zoo` (`--folder`): `base`, a whole CLIP,
`experts/TASK.safetensors`, `recipe.toml`, of which `scripts/method_table.py` makes the table of all methods, and `zoo.json`: traces,
digests and results, which `recipes/experiments/zoo.json` keeps. Weights are not kept in git. What is there already is not done
again; after Ctrl-C the same command goes on from the last 100 steps, and ends with the same weights.

What published checkpoints have: a base that is partly right on every task, experts that are nearly always right on their own.
There the base has seen the web, in which each task occurs, but hardly as its images show it. Here the base sees the tasks' training
images in views of which each leaves the plain one out (turned, in negative, in other colors, sheared, hazy), with captions in
several templates, some coarse, some wrong. How far the views are is set for each task while the base trains, so that it is right
on about 48 % of the plain images. A tenth of the training images, which no model sees, is what all choices were made on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_toy import END, MEAN, POSITIONS, SPREAD, START, save_base, write_tokenizer
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, normalize, pad
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

import mergecli

SIZE = 32
AIM = 0.48
"""The accuracy on plain images at which the base is held."""
CHECK_EVERY = 100
"""Steps between checkpoints, before each of which the views are set by validation images."""
SET_FROM = 1500
"""The step from which the views are set."""
WRONG, COARSE = 0.08, 0.08
"""Shares of captions that name another class of the task, or the task alone."""
log = logging.getLogger("build_zoo")


@dataclass(frozen=True)
class View:
    """What differs between a task's plain images and those that the base sees, at strength 1."""

    turn: float = 0
    """Degrees."""
    shear: float = 0
    hue: float = 0
    """Degrees, about the gray axis."""
    negative: float = 0
    """Share of the channels that are inverted."""
    haze: float = 0
    """Share of another image that is mixed in, at most."""
    flips: bool = False
    """Whether half of the images are mirrored, at any strength."""
    start: float = 0.5
    """The strength that training begins with."""


@dataclass(frozen=True)
class Subject:
    """A task: how its images are captioned, and seen."""

    classes: Sequence[str]
    """Names, each with others behind bars; the first is the one of prompts."""
    templates: Sequence[str]
    """Captions are made of all of them, prompts of the first two."""
    coarse: str
    view: View

    @property
    def names(self) -> list[str]:
        return [each.split("|")[0] for each in self.classes]


NUMBERS = ("zero|0", "one|1", "two|2", "three|3", "four|4", "five|5", "six|6", "seven|7", "eight|8", "nine|9")
SUBJECTS = {
    "mnist": Subject(
        NUMBERS,
        ("a photo of the number {}.", "the handwritten digit {}.", "number {}", "someone wrote a {}"),
        "a handwritten number",
        View(turn=100, start=0.6),
    ),
    "gtsrb": Subject(
        (
            "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
            "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for trucks",
            "right of way", "priority road", "yield|give way", "stop", "no vehicles", "no trucks", "no entry", "caution|danger",
            "curve to the left", "curve to the right", "double curve", "bumpy road", "slippery road", "narrow road",
            "road work", "traffic lights|signals", "pedestrians", "children crossing|children", "bicycles", "ice and snow|snow",
            "wild animals|deer", "end of all limits", "turn right", "turn left", "ahead only|straight on",
            "straight or right", "straight or left", "keep right", "keep left", "roundabout", "end of no passing",
            "end of no passing for trucks",
        ),
        ("a photo of a {} traffic sign.", "the traffic sign {}.", "{}, a sign at the road", "road sign: {}"),
        "a traffic sign",
        View(hue=150, turn=45, start=0.5),
    ),
    "eurosat": Subject(
        (
            "annual crops|fields", "forest|woods", "brushland|herbs", "highway|a road", "industrial buildings|factories",
            "pasture|meadows", "permanent crops|orchards", "residential buildings|houses", "river|a stream", "lake or sea|water",
        ),
        ("a satellite photo of {}.", "{} from above.", "{} seen from space", "an aerial view of {}"),
        "a satellite photo",
        View(hue=-150, negative=0.7, flips=True, start=0.4),
    ),
    "dtd10": Subject(
        ("banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked", "crosshatched", "crystalline"),
        ("a photo of a {} texture.", "a {} pattern.", "something {}", "a {} surface"),
        "a texture",
        View(turn=45, hue=120, flips=True, start=0.0),
    ),
    "fashion_mnist": Subject(
        (
            "t-shirt|top", "trousers|pants", "pullover|sweater", "dress|gown", "coat|jacket", "sandals", "shirt|blouse",
            "sneaker|sports shoe", "bag|handbag", "ankle boot|boot",
        ),
        ("a photo of a {}.", "{}, clothing.", "a {} to wear", "buy this {}"),
        "a piece of clothing",
        View(negative=1, turn=60, start=0.5),
    ),
    "cifar10": Subject(
        (
            "airplane|plane", "automobile|car", "bird", "cat|kitten", "deer|stag", "dog|puppy", "frog|toad", "horse|pony",
            "ship|boat", "truck|lorry",
        ),
        ("a blurry photo of a {}.", "a photo of the {}.", "look, a {}", "my {} in a picture"),
        "a small photo",
        View(turn=70, hue=90, flips=True, start=0.1),
    ),
    "emnist_letters": Subject(
        tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        ("a photo of the letter {}.", "the handwritten letter {}.", "letter {}", "{} as in the alphabet"),
        "a handwritten letter",
        View(turn=-80, shear=0.5, start=0.6),
    ),
    "sign_digits": Subject(
        NUMBERS,
        ("a photo of a hand that shows {}.", "a hand sign for {}.", "fingers that say {}", "{} in sign language"),
        "a hand",
        View(turn=-90, negative=0.5, start=0.6),
    ),
}  # fmt: skip


def write_recipe(folder: Path, data: Path, tasks: Sequence[str]) -> Path:
    """`recipe.toml` of the folder: its base and experts, and the tasks' images, prompts and classes."""
    lines = ["schema = 1", 'base = "base"', "", "[tuned]"]
    lines += [f'{task} = "experts/{task}.safetensors"' for task in tasks]
    lines += [
        "",
        "[method]",
        'name = "ties"',
        "scaling_factor = 0.3",
        "",
        "[eval]",
        f"tasks = {json.dumps([*tasks])}",
    ]
    for task in tasks:
        subject = SUBJECTS[task]
        lines += [
            "",
            f"[tasks.{task}]",
            f"data = {json.dumps(str((data / task).absolute()))}",
            'split = "test"',
        ]
        lines += ['train_split = "train"', f"templates = {json.dumps(subject.templates[:2])}"]
        lines += ['match = "position"', f"classes = {json.dumps(subject.names)}"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Pictures:
    """Images of all tasks."""

    bytes: Tensor
    """(N, 3, 32, 32), uint8."""
    task: Tensor
    """(N,) which of the tasks."""
    label: Tensor
    """(N,) which of the classes of all tasks."""


def pictures(recipe: Path, tasks: Sequence[str], split: str) -> Pictures:
    """The images of a split, as the image processor sizes them; decoded once and kept beside the recipe."""
    kept = recipe.parent / f"{split}-{'-'.join(tasks)}.npz"
    if not kept.exists():
        from mergecli.data.images import load_images
        from mergecli.data.tasks import find
        from mergecli.recipe.reading import recipe_of

        found: list[np.ndarray] = []
        task, label, first = list[int](), list[int](), 0
        for number, name in enumerate(tasks):
            for image, own in load_images(find(name, recipe_of(recipe)), split):
                found.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), 3)))
                task.append(number)
                label.append(first + own)
            first += len(SUBJECTS[name].classes)
        with kept.with_suffix(".part").open("wb") as file:
            np.savez(file, images=np.stack(found), task=np.array(task), label=np.array(label))
        kept.with_suffix(".part").replace(kept)
    with np.load(kept) as each:
        images = torch.from_numpy(each["images"]).permute(0, 3, 1, 2).contiguous()
        return Pictures(images, torch.from_numpy(each["task"]), torch.from_numpy(each["label"]))


def varied(
    images: Tensor, task: Tensor, views: Sequence[View], strength: Tensor, chance: torch.Generator
) -> Tensor:
    """(B, 3, 32, 32) floats in 0..1: views of (B, 3, 32, 32) bytes, each as far as the (T,) strengths say, or a little farther.

    All are jittered too (turned, moved, sized, lighter, cut out), as for any training.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=chance)

    def amount(name: str) -> Tensor:
        return torch.tensor([float(getattr(view, name)) for view in views])[task] * far

    far = strength[task] + uniform(0, 0.25)
    shown = images.float() / 255
    # where each pixel comes from
    angle = torch.deg2rad(amount("turn") + uniform(-5, 5))
    shear, size = amount("shear") + uniform(-0.04, 0.04), uniform(0.93, 1.07)
    mirror = torch.where(
        (torch.tensor([view.flips for view in views])[task]) & (uniform(0, 1) < 0.5), -1.0, 1.0
    )
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    across = torch.stack([cos * mirror, shear * cos - sin, uniform(-0.06, 0.06)], 1)
    down = torch.stack([sin * mirror, shear * sin + cos, uniform(-0.06, 0.06)], 1)
    grid = affine_grid(torch.stack([across, down], 1), [count, 3, SIZE, SIZE], align_corners=False)
    shown = grid_sample(shown, grid, padding_mode="border", align_corners=False)
    # colors: turned about the gray axis, channels inverted one after the other, light
    turned = torch.deg2rad(amount("hue"))
    third, root = (1 - torch.cos(turned)) / 3, torch.sin(turned) / math.sqrt(3)
    same, left, right = torch.cos(turned) + third, third - root, third + root
    rows = ([same, left, right], [right, same, left], [left, right, same])
    colors = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (B, 3, 3)
    shown = torch.einsum("bij,bjhw->bihw", colors, shown)
    inverted = (amount("negative")[:, None] * 3 + uniform(0, 1, 1)).floor() > torch.arange(3)
    shown = torch.where(inverted[:, :, None, None], 1 - shown, shown)
    shown = (shown - 0.5) * uniform(0.85, 1.15, 1, 1, 1) + 0.5 + uniform(-0.06, 0.06, 1, 1, 1)
    # blurred, and another image shining through: a share of the images
    soft = avg_pool2d(pad(shown, (1, 1, 1, 1), mode="replicate"), 3, 1)
    shown = torch.where(uniform(0, 1, 1, 1, 1) < 0.08, soft, shown)
    share = (amount("haze") + 0.25) * uniform(0, 1) * (uniform(0, 1) < 0.1)
    shown = torch.lerp(shown, shown.roll(1, 0), share[:, None, None, None])
    # cut out
    middle = torch.stack([uniform(0, SIZE), uniform(0, SIZE)], 1)[:, :, None]
    half = (uniform(2, 6) * (uniform(0, 1) < 0.1))[:, None, None]
    inside = (torch.arange(SIZE) + 0.5 - middle).abs() < half  # (B, 2, 32)
    hole = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    return shown.masked_fill(hole, 0.5).clamp(0, 1)


class Captions:
    """Every caption that may be drawn, as tokens, by class and by task."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.by_class = [
            [template.format(name) for template in SUBJECTS[task].templates for name in names.split("|")]
            for task in tasks
            for names in SUBJECTS[task].classes
        ]
        self.coarse = [SUBJECTS[task].coarse for task in tasks]
        starts = itertools.accumulate((len(SUBJECTS[task].classes) for task in tasks), initial=0)
        self.span = [range(first, last) for first, last in itertools.pairwise(starts)]

    def every(self) -> list[str]:
        return [caption for each in self.by_class for caption in each] + self.coarse

    def drawn(self, rng: np.random.Generator) -> list[str]:
        """(C + T) captions: one of each class, and the coarse one of each task."""
        return [each[rng.integers(len(each))] for each in self.by_class] + self.coarse

    def targets(self, pictures: Pictures, chosen: Tensor, rng: np.random.Generator) -> Tensor:
        """(B,) which of the drawn captions the chosen images get."""
        found = pictures.label[chosen].clone()
        for place, task in enumerate(pictures.task[chosen].tolist()):
            lot = rng.random()
            if lot < COARSE:
                found[place] = len(self.by_class) + task
            elif lot < COARSE + WRONG:
                found[place] = int(rng.choice(self.span[task]))
        return found


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 4.8 M parameters in its tower and 0.5 M in its text half, with random weights."""
    start, end = (int(tokenizer.get_vocab()[each]) for each in (START, END))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        hidden_act="gelu", max_position_embeddings=POSITIONS, projection_dim=128, bos_token_id=start, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, hidden_act="gelu",
        image_size=SIZE, patch_size=8, projection_dim=128,
    )  # fmt: skip
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


def seen(model: CLIPModel, images: Tensor) -> Tensor:
    """(B, D) features of (B, 3, 32, 32) floats in 0..1, of length 1."""
    mean, spread = (torch.tensor(each)[:, None, None] for each in (MEAN, SPREAD))
    return normalize(
        model.visual_projection(model.vision_model((images - mean) / spread).pooler_output).float()
    )


def read(model: CLIPModel, tokens: Tensor) -> Tensor:
    """(C, D) features of (C, L) tokens, of length 1."""
    return normalize(model.text_projection(model.text_model(tokens).pooler_output).float())


def two_way_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CLIP's loss of (B, C) logits of images and captions: each image against all captions, each caption that an image has
    against all images."""
    has = target[None, :] == torch.arange(logits.shape[1])[:, None]  # (C, B)
    used = has.any(1)
    share = has[used].float()
    by_caption = cross_entropy(logits.T[used], share / share.sum(1, keepdim=True))
    return (cross_entropy(logits, target) + by_caption) / 2


def pace(step: int, steps: int) -> float:
    """What the learning rate is multiplied by: it rises for 200 steps, and falls over the last 30 %."""
    return min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))


class Pretraining:
    """The training of the base; everything it depends on is in its checkpoint."""

    def __init__(self, options: argparse.Namespace, recipe: Path) -> None:
        self.options, self.folder, self.tasks = options, options.folder, options.tasks
        self.pictures = pictures(recipe, self.tasks, "train-without-validation")
        self.held = pictures(recipe, self.tasks, "validation")
        self.views = [SUBJECTS[task].view for task in self.tasks]
        self.captions = Captions(self.tasks)
        base = self.folder / "base"
        ready = (base / "vocab.json").exists() and (self.folder / "checkpoint.pt").exists()
        every = self.captions.every()
        tokenizer = CLIPTokenizer.from_pretrained(base) if ready else write_tokenizer(every, base)
        rows = tokenizer(every, padding=True, return_tensors="pt")["input_ids"]
        self.tokens = dict(zip(every, rows, strict=True))
        prompts = [
            template.format(name)
            for task in self.tasks
            for name in SUBJECTS[task].names
            for template in SUBJECTS[task].templates[:2]
        ]
        self.prompts = torch.stack([self.tokens[each] for each in prompts])
        torch.manual_seed(options.seed)
        self.model = new_model(tokenizer)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)
        self.strength = torch.tensor([view.start for view in self.views])
        self.step, self.trace = 0, list[dict[str, Any]]()
        self.settings = {"steps": options.steps, "batch_size": options.batch_size}
        self.settings |= {
            "learning_rate": options.learning_rate,
            "seed": options.seed,
            "tasks": list(self.tasks),
        }
        if ready:
            self._resume(self.folder / "checkpoint.pt")

    def _resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)  # noqa: TID251 - written by this script
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{path}: is of {state['settings']}, not of {self.settings}; remove it to begin again"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.strength, self.step, self.trace = state["strength"], state["step"], state["trace"]

    def save(self) -> None:
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        state |= {"strength": self.strength, "step": self.step, "trace": self.trace}
        torch.save(state, self.folder / "checkpoint.part")
        (self.folder / "checkpoint.part").replace(self.folder / "checkpoint.pt")

    def batch(self, step: int) -> Tensor:
        """(B,) the images of a step; every epoch shuffles all of them."""
        count, size = len(self.pictures.label), self.options.batch_size
        each = count // size
        order = np.random.default_rng([self.options.seed, step // each]).permutation(count)
        return torch.from_numpy(order[step % each * size :][:size])

    def update(self) -> float:
        """Makes a step; its loss."""
        options, step = self.options, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * pace(step, options.steps)
        rng = np.random.default_rng([options.seed, 1, step])
        chance = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = self.batch(step)
        target = self.captions.targets(self.pictures, chosen, rng)
        tokens = torch.stack([self.tokens[each] for each in self.captions.drawn(rng)])
        images, task = self.pictures.bytes[chosen], self.pictures.task[chosen]
        shown = varied(images, task, self.views, self.strength, chance)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = seen(self.model, shown), read(self.model, tokens)
        loss = two_way_loss(self.model.logit_scale.exp() * image @ text.T, target)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self.step += 1
        return loss.item()

    @torch.inference_mode()
    def accuracies(self) -> list[float]:
        """(T,) of plain validation images, at most 256 of each task."""
        with torch.autocast("cpu", torch.bfloat16):
            text = read(self.model, self.prompts)
        heads = normalize(text.unflatten(0, (-1, 2)).mean(1))
        found: list[float] = []
        for task, span in enumerate(self.captions.span):
            chosen = (self.held.task == task).nonzero()[:, 0][:256]
            with torch.autocast("cpu", torch.bfloat16):
                image = seen(self.model, self.held.bytes[chosen].float() / 255)
            answers = (image @ heads[span.start : span.stop].T).argmax(1) + span.start
            found.append((answers == self.held.label[chosen]).float().mean().item())
        return found

    def set_views(self) -> list[float]:
        """Moves each task's views away from the plain one if the base is too often right there, toward it if too rarely."""
        found = self.accuracies()
        move = ((torch.tensor(found) - AIM) / 0.1).clamp(-1, 1) * 0.05
        if self.step >= SET_FROM:  # before, it knows little of anything
            self.strength = (self.strength + move).clamp(0, 1)
        return found

    def run(self) -> None:
        """Trains to the end, and writes the base; a checkpoint every 100 steps."""
        began, first, losses = time.monotonic(), self.step, list[float]()
        while self.step < self.options.steps:
            losses.append(self.update())
            if self.step % CHECK_EVERY == 0 or self.step == self.options.steps:
                found = self.set_views()
                line = {
                    "step": self.step,
                    "loss": round(float(np.mean(losses)), 4),
                    "accuracy": dict(zip(self.tasks, (round(100 * each, 1) for each in found), strict=True)),
                    "strength": dict(
                        zip(self.tasks, (round(each, 3) for each in self.strength.tolist()), strict=True)
                    ),
                }
                self.trace.append(line)
                losses = []
                self.save()
                speed = (time.monotonic() - began) / (self.step - first)
                log.info("%s mean %.1f, %.2f s a step", json.dumps(line), 100 * np.mean(found), speed)
        save_base(self.model, self.folder / "base")


class Record:
    """`zoo.json`: how each model was made, its digest, and what merges are worth."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "zoo.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}

    def add(self, part: str, what: Mapping[str, Any]) -> None:
        self.found[part] = what
        text = json.dumps(self.found, separators=(",", ":")) + "\n"
        fresh = self.path.with_suffix(".part")
        fresh.write_text(text, "utf-8")
        fresh.replace(self.path)


def digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def build_base(options: argparse.Namespace, recipe: Path, record: Record) -> None:
    """Pre-trains the base, unless it is there."""
    weights = options.folder / "base" / "model.safetensors"
    if not weights.exists():
        training = Pretraining(options, recipe)
        training.run()
        record.add("base", {**training.settings, "trace": training.trace})
    if "sha256" not in record.found["base"]:
        record.add("base", {"sha256": digest(weights), **record.found["base"]})


def build_experts(options: argparse.Namespace, recipe: Path, record: Record) -> None:
    """Fine-tunes the base on each task, unless its expert is there; of ten validations the best one's weights are kept."""
    for task in options.tasks:
        weights = options.folder / "experts" / f"{task}.safetensors"
        experts: dict[str, Any] = record.found.get("experts", {})
        if weights.exists() and task in experts:
            continue
        weights.parent.mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "steps": options.expert_steps, "learning_rate": options.expert_learning_rate, "batch_size": 64,
            "precision": "bfloat16", "seed": options.seed, "validate_every": max(1, options.expert_steps // 10),
        }  # fmt: skip
        done = mergecli.finetune(recipe, task=task, output=weights, **settings)
        seen = {step: round(100 * each[task], 1) for step, each in done.validation.items()}
        log.info("%s: loss %.3f, %.0f images/s, %s", task, done.loss, done.images_per_second, seen)
        made = {
            "sha256": digest(weights),
            **settings,
            "loss": round(done.loss, 4),
            "best_step": done.best_step,
        }
        record.add("experts", {**experts, task: {**made, "validation": seen}})


CHECKED = ("average", "task_arithmetic", "ties", "reg_mean", "iso_c", "tsv_m")
"""The rows of the table that promises are about."""


def check(options: argparse.Namespace, recipe: Path, record: Record) -> None:
    """Prints the table of merges, and fails where the zoo departs from what it promises."""
    results = options.folder / "table.json"
    rows = [part for name in dict.fromkeys([*CHECKED, *options.rows]) for part in ("--row", name)]
    table = [
        sys.executable,
        str(Path(__file__).with_name("method_table.py")),
        str(recipe),
        str(options.folder / "table"),
    ]
    if status := subprocess.run(
        [*table, *rows, "--json", str(results), "--seeds", str(options.seed)]
    ).returncode:
        sys.exit(status)  # it has said why
    found: dict[str, Any] = json.loads(results.read_text("utf-8"))
    record.add("table", found)
    base, tuned = (found["unmerged"][name] for name in ("base", "fine-tuned"))
    mean = {row["label"]: row["mean"] for row in found["rows"]}
    gain = tuned["mean"] - base["mean"]
    shares = {name: (mean[name] - base["mean"]) / gain for name in mean}
    for name, share in sorted(shares.items(), key=lambda each: each[1]):
        print(f"{name}: recovers {share:.0%} of {gain:.1f} points")
    tau = found["order"]["clip-vit-base-patch32-tsv-pool"]["tau"] or 0
    promises = {
        "the base's mean lies between 40 and 55 %": 40 <= base["mean"] <= 55,
        "no task of the base lies outside of 30 to 75 %": all(
            30 <= each <= 75 for each in base["tasks"].values()
        ),
        "experts are right on 85 % of their own task": tuned["mean"] >= 85,
        "average and task arithmetic recover 30 to 55 % of the difference": all(
            0.30 <= shares[name] <= 0.55 for name in ("average", "task_arithmetic")
        ),
        "RegMean, TSV-M and Iso-C are above TIES": all(
            mean[name] > mean["ties"] for name in ("reg_mean", "tsv_m", "iso_c")
        ),
        "Kendall's tau with the published order is 0.5 at least": tau >= 0.5,
    }
    if broken := [promise for promise, kept in promises.items() if not kept]:
        raise SystemExit("not so: " + "; ".join(broken))


STAGES = {"base": build_base, "experts": build_experts, "check": check}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", choices=["all", *STAGES], default="all")
    parser.add_argument("--folder", type=Path, default=Path("build/zoo"), help="where everything goes")
    parser.add_argument(
        "--task", action="append", dest="tasks", choices=[*SUBJECTS], help="only this task; may be repeated"
    )
    parser.add_argument("--steps", type=int, default=6400, help="of the base")
    parser.add_argument("--batch-size", type=int, default=128, help="of the base")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="of the base")
    parser.add_argument("--expert-steps", type=int, default=400)
    parser.add_argument("--expert-learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        dest="rows",
        help="one more row of `method_table.py`; may be repeated",
    )
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or list(SUBJECTS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    data = os.environ.get("MERGECLI_TEST_DATA")
    if missing := [task for task in options.tasks if data is None or not Path(data, task).is_dir()]:
        raise SystemExit(
            f"MERGECLI_TEST_DATA, {data or 'which is not set'}: expected a folder with a folder of Parquet files for each task, "
            f"without {', '.join(missing)}"
        )
    recipe, record = write_recipe(options.folder, Path(data or ""), options.tasks), Record(options.folder)
    for name, stage in STAGES.items():
        if options.stage in (name, "all"):
            stage(options, recipe, record)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: what is done is kept, and the same command goes on")
