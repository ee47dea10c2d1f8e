"""`sweep`: one merge for each value of some settings, every pass over the models shared."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from mergecli import methods
from mergecli.formats.opening import model_path
from mergecli.merging.learning.calibration import calibration_task
from mergecli.merging.learning.files import LearningFiles
from mergecli.merging.learning.needed_files import SETTINGS
from mergecli.merging.merge import Merged, merge_points
from mergecli.merging.models import open_models
from mergecli.methods._base import DataDriven
from mergecli.methods._calibrated import measured_by
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe, recipe_text
from mergecli.recipe.toml import Override, parse_value
from mergecli.runtime.errors import UsageError
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import check_target, warn_of_others
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from mergecli.storage.store import locate

MOST = 1000
"""The most points of one sweep; more is taken for a typing error."""
_LONGEST = 160
"""Characters of a point's name; of a longer one the end is a digest, since names of files are at most 255 bytes long."""


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One value for each axis, and the recipe with them."""

    values: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """What files and results are called by: `ties,scaling_factor-0.3`."""
        parts = [f"{_label(key)}-{_short(each)}" for key, each in self.values.items() if key != "method.name"]
        name = ",".join([str(self.recipe.method), *parts])
        if len(name) <= _LONGEST:
            return name
        return f"{name[: _LONGEST - 17]},{sha256(name.encode()).hexdigest()[:16]}"


def parse_axis(text: str) -> Axis:
    """`KEY=FIRST:LAST:STEP`, both ends included, or `KEY=VALUE,VALUE,...`; a value is TOML or a bare word.

    Raises:
        UsageError: it is neither, or the key is no setting of the method.
    """
    key, equals, written = (part.strip() for part in text.partition("="))
    if not equals or not written or not (key.startswith("method.") and len(key) > len("method.")):
        is_setting = equals and written and key and "." not in key
        raise UsageError(
            f"sweep `{text}`: expected `method.SETTING=FIRST:LAST:STEP` or `method.SETTING=VALUE,VALUE,...`"
            + (f" (did you mean `method.{text}`?)" if is_setting else "")
        )
    try:
        is_range = written.count(":") == 2 or _WITHOUT_STEP.fullmatch(written)
        values = _range(written, text) if is_range else tuple(map(parse_value, split_values(written)))
    except ValueError as error:
        raise UsageError(f"sweep `{text}`: {error}") from error
    if not values:
        raise UsageError(f"sweep `{text}`: there are no values")
    if len(set(map(repr, values))) != len(values):
        raise UsageError(f"sweep `{text}`: a value stands there twice")
    return Axis(key, values)


def points_of(
    recipe: str | Path | Mapping[str, str | Path],
    over: Sequence[str],
    *,
    base: str | Path | None = None,
    method: str | None = None,
    changes: Sequence[str] = (),
) -> tuple[Point, ...]:
    """The points of a sweep, the last axis fastest.

    Raises:
        UsageError: an axis is wrong, or a value does not fit its setting.
    """
    axes = [parse_axis(each) for each in over]
    keys = [axis.key for axis in axes]
    if not axes or len(set(keys)) != len(keys):
        raise UsageError(
            "a sweep goes over one or more settings, each named once", "`--sweep method.density=0.1,0.2`"
        )
    if math.prod(len(axis.values) for axis in axes) > MOST:
        raise UsageError(f"the sweep has more than {MOST} points")
    points: list[Point] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = dict(zip(keys, values, strict=True))
        swept = [Override(key, value, "--sweep") for key, value in chosen.items()]
        known = recipe_of(recipe, base=base, method=method, changes=changes, overrides=swept)
        if known.as_adapter:
            raise UsageError(
                "as_adapter: a sweep makes whole weights",
                "sweep with `--set as_adapter=false --set space=core`, then merge the best point as an adapter",
            )
        points.append(Point(chosen, known))
    names = Counter(point.name for point in points)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise UsageError(f"two points of the sweep would be called `{twice[0]}`", "sweep over fewer tables")
    return tuple(points)


def merge_sweep(
    points: Sequence[Point],
    output: str | Path,
    *,
    device: str = "cpu",
    statistics: Path | None = None,
    coefficients: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Merged, ...]:
    """Writes one checkpoint a point into the folder `output`, each called after its point.

    Raises:
        UsageError: the output is no folder, or a point's method cannot do what is asked. InputError: as `merge`.
    """
    target = Path(output)
    if target.suffix == ".safetensors":
        raise UsageError(
            f"{target}: a sweep writes several files, so the output is a folder",
            f"write `-o {target.with_suffix('')}/`",
        )
    check_target(target, folder=True)
    warn_of_others(target, {path.name for path in point_files(points, target)})
    return merge_batch(
        points, target, device=device, files=LearningFiles(statistics, coefficients), progress=progress
    )


def merge_batch(
    points: Sequence[Point],
    folder: Path,
    *,
    device: str = "cpu",
    files: LearningFiles | None = None,
    progress: Progress | None = None,
) -> tuple[Merged, ...]:
    """Some of a sweep's points, merged in one pass, whose folder has been checked."""
    return merge_points(point_files(points, folder), device=device, files=files, progress=progress)


def point_files(points: Sequence[Point], folder: Path) -> dict[Path, Recipe]:
    """The checkpoint of each point in the folder, and the recipe that makes it."""
    return {folder / f"{point.name}.safetensors": point.recipe for point in points}


@dataclass(frozen=True)
class Identities:
    """What tells the merges of a sweep from others before they are made."""

    inputs: Mapping[str, str]
    """Model -> digest."""
    points: Mapping[str, str]
    """Name of a point -> text of all that its merge depends on."""


def model_digests(points: Sequence[Point]) -> dict[str, str]:
    """Model -> digest.

    Raises:
        UsageError, InputError: models are missing or damaged, or do not fit together.
    """
    with ExitStack() as stack:
        needs = "base" if any(point.recipe.built.reads_base for point in points) else "weights"
        return open_models(points[0].recipe, stack, needs=needs).digests()


def identities(points: Sequence[Point], device: str, inputs: Mapping[str, str] | None = None) -> Identities:
    """Reads the models and the data that the points' methods look at, and merges nothing.

    Args:
        inputs: what `model_digests` gives, if it is known.

    Raises:
        UsageError, InputError: models or data are missing or damaged, or the models do not fit together.
    """
    from mergecli.storage.metadata import version

    inputs = model_digests(points) if inputs is None else inputs
    found: dict[str, str] = {}
    for point in points:
        method = point.recipe.built
        settings = methods.recipe_table(method)
        text = recipe_text(point.recipe, str(point.recipe.method), settings)
        looks = measured_by(method) or method
        seen = _looked_at(point.recipe, looks) if isinstance(looks, DataDriven) else []
        about = [point.name, version(), device.partition(":")[0], text, list(inputs.items()), seen]
        found[point.name] = json.dumps(about)
    return Identities(inputs, found)


def _looked_at(recipe: Recipe, method: DataDriven) -> list[object]:
    """What tells the images, the rest of the CLIP and the other files that a method looks at from others."""
    from mergecli.clip.heads import surroundings

    split, tasks = str(getattr(method, "split", "train")), getattr(method, "adapt_on", ()) or recipe.tuned
    images = [calibration_task(task, split, recipe).facts(head=True) for task in tasks]
    rest = surroundings(model_path(recipe.base), head=True) if recipe.base else {}
    files: list[str] = []
    for need in sorted(getattr(method, "needs", ())):
        if name := getattr(method, SETTINGS[need]):
            with open_checkpoint(locate(parse_source(name, Path()))) as opened:
                files.append(opened.digest())
    return [images, rest, files]


_WITHOUT_STEP = re.compile(r"[-+]?[.\d][^:,]*:[^:,]*")
"""What is meant as `FIRST:LAST:STEP`, though its step was left out."""


def _range(written: str, text: str) -> tuple[Any, ...]:
    """The numbers from first to last; decimal, so that 0.1:0.3:0.1 ends with 0.3."""
    wrong = f"sweep `{text}`: expected `FIRST:LAST:STEP`, such as 0.1:1.0:0.1"
    try:
        first, last, step = (Decimal(part.strip()) for part in written.split(":"))
        count = int((last - first) / step) if step else -1
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise UsageError(wrong) from error
    if count < 0 or (last - first) * step < 0 or (count == 0 and first != last):
        raise UsageError(f"{wrong}: no steps of {step} lead from {first} to {last}")
    if count >= MOST:
        raise UsageError(f"sweep `{text}`: has {count + 1:,} values, of which at most {MOST:,} are allowed")
    values = [first + number * step for number in range(count + 1)]
    whole = all(value == value.to_integral_value() for value in (first, step)) and "." not in written
    return tuple(int(value) if whole else float(value) for value in values)


def split_values(written: str) -> list[str]:
    """The values between the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in written:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _label(key: str) -> str:
    """A setting as part of a file's name: `density`, and `layers0.density` of one by layer."""
    line, by_layer, name = key.removeprefix("method.").partition("].")
    return f"{line.replace('[', '')}.{name}" if by_layer else key.rpartition(".")[2]


def _short(value: Any) -> str:
    """A value as part of a file's name."""
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        value = "-".join(
            [str(table.get("name", "")), *(f"{key}-{each}" for key, each in table.items() if key != "name")]
        )
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).strip("-")
