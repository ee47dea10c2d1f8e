"""One bit of a kept file changes, as disks and memory do it: no number changes without a word."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergecli.clip.heads import cached_head, clip_digests
from mergecli.clip.model import load_clip
from mergecli.clip.pixels import Processing, cached_pixels
from mergecli.data import splits
from mergecli.data.images import load_images
from mergecli.data.tasks import find
from mergecli.evaluation.counting import Counts, counts_file, read_counts
from mergecli.formats.convert import convert_once, converted_path
from mergecli.formats.opening import open_source
from mergecli.hub.store import partial_folder, put_in_place, sha256_of
from mergecli.merging.learning.adaptation_loop import LoopState
from mergecli.merging.merge import merge
from mergecli.merging.taskvector import taskvector
from mergecli.recipe.reading import recipe_of
from mergecli.runtime.distributed import Ranks
from mergecli.runtime.engines.contract import Unit
from mergecli.runtime.engines.worker import report_of
from mergecli.runtime.errors import InputError, MergecliError, MergecliWarning
from mergecli.storage.sources import parse_source
from mergecli.storage.store import MANIFEST, Manifest, Store, StoredFile, locate
from mergecli.storage.units import UnitFiles
from mergecli.training.resume import TrainingState, read_state, state_file
from tests.support.adapted_world import SHORT, AdaptedWorld, make_adapted_world
from tests.support.kept_files import flip

pytestmark = pytest.mark.usefixtures("own_store")


@dataclass(frozen=True)
class Kept:
    """A kept file, and what is made of it."""

    files: list[Path]
    use: Callable[[], object]
    """Reads the file; what comes of it is a number, or numbers, to be compared."""
    is_made_again: bool
    """Whether damage is mended with a note; else it is refused."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    made = make_adapted_world(tmp_path_factory.mktemp("kept"))
    merge(made.recipe, method="task_arithmetic", output=made.folder / "merged.safetensors")
    return made


Make = Callable[[AdaptedWorld, Path, pytest.MonkeyPatch], Kept]


def pixels(world: AdaptedWorld, _tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    clip, images = load_clip(world.folder / "base"), load_images(find("one", recipe_of(world.recipe)))

    def use() -> object:
        found = cached_pixels(clip, images, Processing(max_size=10**9))
        return found.batch(0, len(found)).tolist(), found.rows(torch.tensor([3, 0])).tolist()

    use()
    return Kept(in_cache("pixels"), use, is_made_again=True)


def chosen_pixels(world: AdaptedWorld, tmp: Path, patch: pytest.MonkeyPatch) -> Kept:
    whole = pixels(world, tmp, patch)
    clip, images = load_clip(world.folder / "base"), load_images(find("one", recipe_of(world.recipe)))
    some = images.chosen([5, 1])

    def use() -> object:
        return cached_pixels(clip, some, Processing(max_size=10**9)).batch(0, 2).tolist()

    return Kept(whole.files, use, is_made_again=True)


def heads(world: AdaptedWorld, _tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    clip = load_clip(world.folder / "base")

    def use() -> object:
        return cached_head(clip, ("red", "green"), ("a {}", "the {}"), "text", 10**9).tolist()

    use()
    return Kept(in_cache("heads"), use, is_made_again=True)


def units(_world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    files, labels = UnitFiles(tmp, 0, what="its images are counted"), [0, 1, 2, 1]
    counts = Counts(labels, [0, 1, 1, 1], [0.5, 0.25, 0.75, 0.5], [1.5, 2.5], [0.75, 1.25])
    unit = Unit(("tower", "task"), "0" * 32)
    files.save(unit, report_of(counts_file(counts, {"what": "counts"}), "cpu", 1.0))
    return Kept(
        [files.path(unit)],
        lambda: files.read(unit, lambda stored: read_counts(stored, labels)),
        is_made_again=True,
    )


def digests(world: AdaptedWorld, tmp: Path, patch: pytest.MonkeyPatch) -> Kept:
    file = tmp / "data.parquet"
    shutil.copy(world.folder / "data-one" / "test-00000-of-00001.parquet", file)
    os.utime(file, (1e9, 1e9))
    patch.setattr(splits, "LARGE", 1)
    patch.setattr(splits, "_SETTLED", -(10**6))

    def use() -> object:
        return splits.fingerprint([file], with_names=False).digest

    use()
    return Kept(in_cache("digests"), use, is_made_again=True)


def statistics(method: str, *, named: bool) -> Make:
    def make(world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
        folder = tmp / "statistics" if named else None

        def use() -> object:
            return merged(world, tmp, method, {"examples": 4, "batch_size": 4}, statistics=folder)

        use()
        return Kept(list((folder or tmp / "home" / "statistics").rglob("*.safetensors")), use, not named)

    return make


def learned(method: str, *, named: bool, **settings: Any) -> Make:
    def make(world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
        own = {**SHORT, "steps": 2, **settings}
        if method == "representation_surgery":
            own["merged"] = str(world.folder / "merged.safetensors")
        file = tmp / "learned.safetensors"
        merged(world, tmp, method, own, save_coefficients=file)

        def use() -> object:
            return merged(world, tmp, method, own, **({"coefficients": file} if named else {}))

        stored = [each for each in (tmp / "home" / "coefficients").rglob("*") if each.parent.name != "tasks"]
        return Kept([file] if named else [each for each in stored if each.is_file()], use, not named)

    return make


def parts_of_surgery(world: AdaptedWorld, tmp: Path, patch: pytest.MonkeyPatch) -> Kept:
    whole = learned("representation_surgery", named=False, rank=2)(world, tmp, patch)

    def use() -> object:
        for file in whole.files:
            file.unlink(missing_ok=True)
        return whole.use()

    return Kept(list((tmp / "home" / "coefficients").rglob("tasks/*")), use, is_made_again=True)


def state_of_an_adaptation(_world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "coefficients": torch.randn(5, generator=generator),
        "moments": torch.randn(5, generator=generator),
    }

    def loop() -> LoopState:
        blank = {name: torch.zeros_like(each) for name, each in weights.items()}
        return LoopState(tmp / "x.partial.safetensors", "key", blank, (9,), 0)

    first = loop()
    first.state = weights
    first.add(torch.tensor([0.25, 0.5]), torch.tensor([0.125, 0.5]))
    first.save()

    def use() -> object:
        found = loop()
        found.load(Ranks(), 2, 2)
        losses = [each.tolist() for each in found.entropies]
        return None if not found.step else ({k: v.tolist() for k, v in found.state.items()}, losses)

    return Kept([first.path], use, is_made_again=True)


def state_of_a_training(_world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    work = {"learning_rate": 0.1, "weight_decay": 0.0}
    torch.manual_seed(0)
    state = TrainingState(tmp / "x.safetensors", {"w": nn.Parameter(torch.randn(7))}, work, 1, Ranks())
    state.losses += [[0.5], [0.25]]
    state.record_validation([0.75])
    state.save()

    def use() -> object:
        found = read_state(state.path, work, state.parameters, 1)
        return found and (dict(found.counters), {name: each.tolist() for name, each in found.tensors.items()})

    return Kept([state_file(tmp / "x.safetensors")], use, is_made_again=True)


def fetched_model(world: AdaptedWorld, _tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    source = parse_source("hf:org/clip", Path())
    folder = fetched(world.folder / "base")

    def use() -> object:
        path = locate(source)
        with open_source(source) as opened:
            texts = [(path / name).read_bytes() for name in ("config.json", "preprocessor_config.json")]
            return opened.vision().digest(), clip_digests(path), texts

    names = ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", MANIFEST)
    return Kept([folder / name for name in names], use, is_made_again=False)


def converted_pickle(world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    torch.save(world.tuned[0], tmp / "m.pt")
    target = converted_path(tmp / "m.pt", tmp / "home", allow_pickle=True)
    convert_once(tmp / "m.pt", target)

    def use() -> object:
        with open_source(parse_source(str(tmp / "m.pt"), Path())) as opened:
            return opened.digest()

    return Kept([target], use, is_made_again=False)


def index_of_shards(world: AdaptedWorld, tmp: Path, _patch: pytest.MonkeyPatch) -> Kept:
    merge(world.recipe, method="average", output=tmp / "model", shard_size="20kB")

    def use() -> object:
        with open_source(parse_source(str(tmp / "model"), Path())) as opened:
            return opened.digest()

    return Kept([tmp / "model" / "model.safetensors.index.json"], use, is_made_again=False)


KINDS: dict[str, Make] = {
    "pixels": pixels,
    "chosen pixels": chosen_pixels,
    "heads": heads,
    "units": units,
    "digests": digests,
    "statistics of one task": statistics("fisher", named=False),
    "statistics in a folder of the user's": statistics("reg_mean", named=True),
    "statistics of all tasks": statistics("reg_mean_plus_plus", named=False),
    "coefficients": learned("ada_merging", named=False),
    "coefficients in a file of the user's": learned("ada_merging", named=True),
    "masks": learned("concrete_task_arithmetic", named=False),
    "routers": learned("weight_ensembling_moe", named=True),
    "surgery": learned("representation_surgery", named=False, rank=2),
    "surgery of one task": parts_of_surgery,
    "state of an adaptation": state_of_an_adaptation,
    "state of a training": state_of_a_training,
    "fetched model": fetched_model,
    "converted pickle": converted_pickle,
    "index of shards": index_of_shards,
}


def in_cache(kind: str) -> list[Path]:
    return list((Path(os.environ["MERGECLI_HOME"]) / "cache" / kind).iterdir())


def merged(world: AdaptedWorld, tmp: Path, method: str, settings: dict[str, Any], **more: Any) -> bytes:
    merge(world.recipe, method=method, settings=settings, output=tmp / "merged.safetensors", **more)
    return (tmp / "merged.safetensors").read_bytes()


def fetched(origin: Path) -> Path:
    """A model in the store as `fetch` puts it there: `hf:org/clip`."""
    store, source = Store(Path(os.environ["MERGECLI_HOME"])), parse_source("hf:org/clip", Path())
    arriving = partial_folder(store, source, "c" * 40)
    shutil.copytree(origin, arriving)
    files = [StoredFile(each.name, each.stat().st_size, sha256_of(each)) for each in arriving.iterdir()]
    put_in_place(store, source, "c" * 40, files, Manifest())
    store.reference_file(source).parent.mkdir()
    store.reference_file(source).write_text("c" * 40)
    return store.folder(source, "c" * 40)


def header_size(file: Path) -> int:
    start = file.read_bytes()[:8]
    return 8 + int.from_bytes(start, "little") if file.suffix == ".safetensors" else file.stat().st_size


def flips(kept: Kept, count: int) -> list[tuple[Path, int]]:
    """Bits to change, half of them in headers: most of a file is data."""
    rng, found = random.Random(1), list[tuple[Path, int]]()
    for number in range(count):
        file = kept.files[number % len(kept.files)]
        size = header_size(file) if number % 4 < 2 else file.stat().st_size
        found.append((file, rng.randrange(8 * size)))
    return found


def never_changes_silently(kept: Kept, count: int) -> None:
    want, noticed = kept.use(), 0
    for file, bit in flips(kept, count):
        whole = file.read_bytes()
        flip(file, bit)
        error, found = None, None
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            try:
                found = kept.use()
            except MergecliError as refusal:
                error = refusal
        told = [str(each.message) for each in notes if issubclass(each.category, MergecliWarning)]
        if error is not None:
            assert not kept.is_made_again, (file, bit, error)
            assert str(file) in error.message or str(file.parent) in error.message
            assert error.hint
        else:
            assert found == want or (found is None and told), (file, bit)
            assert not told or str(file) in told[0]
        noticed += bool(error or told)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(whole)
    assert noticed


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_bit_of_a_kept_file_changes_no_number_without_a_word(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    never_changes_silently(KINDS[kind](world, tmp_path, monkeypatch), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_many_changes_a_number_without_a_word(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    never_changes_silently(KINDS[kind](world, tmp_path, monkeypatch), 200)


def test_a_task_vector_whose_kind_cannot_be_read_is_never_read_as_weights(
    world: AdaptedWorld, tmp_path: Path
) -> None:
    file = tmp_path / "v.safetensors"
    taskvector(world.folder / "one.safetensors", base=world.folder / "base", output=file)
    whole = file.read_bytes()
    for words in (b'"kind":"task vector"', b'"mergecli":"', b'"__metadata__":'):
        start = whole.index(words)
        for bit in range(8 * start, 8 * (start + len(words))):
            flip(file, bit)
            message, is_vector = "", False
            try:
                with open_source(parse_source(str(file), Path())) as opened:
                    is_vector = opened.is_task_vector
            except InputError as error:
                message = error.message
            assert is_vector or str(file) in message
            file.write_bytes(whole)


def test_a_file_of_ours_without_its_kind_is_refused(world: AdaptedWorld, tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    taskvector(world.folder / "one.safetensors", base=world.folder / "base", output=file)
    file.write_bytes(file.read_bytes().replace(b'"kind":', b'"kine":'))
    with pytest.raises(InputError) as caught:
        open_source(parse_source(str(file), Path()))
    assert str(caught.value) == (
        f"{file}: its kind: expected checkpoint, task vector or mixture, got none\n"
        "hint: it holds no model, or was written by a later version: `mergecli info` says by which"
    )


def test_a_manifest_of_before_there_were_checksums_is_read_as_before(world: AdaptedWorld) -> None:
    folder = fetched(world.folder / "base")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["checksums"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with open_source(parse_source("hf:org/clip", Path())) as opened:
        assert not opened.hashes.expected
        assert opened.digest()
