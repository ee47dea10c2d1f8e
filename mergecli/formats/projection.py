"""Visual projections: merged and evaluated with the vision tower where they were fine-tuned too, as open_clip's encoders are."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergecli.formats.lora import AdaptedCheckpoint
from mergecli.runtime.errors import MergecliWarning, quoted
from mergecli.runtime.notes import note
from mergecli.storage.checkpoint import PROJECTION, Checkpoint, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CompletedCheckpoint(Checkpoint):
    """A vision tower with a projection that is not its own. Its digest is that of the tower, whatever it is merged with."""

    tower: Checkpoint
    source: Checkpoint | None
    """What has the projection; None stands for zeros, those of a task vector."""

    @classmethod
    def of(cls, model: Checkpoint, source: Checkpoint | None, shape: tuple[int, ...]) -> CompletedCheckpoint:
        """The model's tower with the projection of `source`, or with zeros of this shape."""
        tower = model.without_projection()
        entry = source.entries[PROJECTION] if source else TensorEntry("F32", shape, 0, 0)
        return cls(
            path=tower.path,
            entries=dict(sorted({**tower.entries, PROJECTION: entry}.items())),
            metadata=tower.metadata,
            files=tower.files,
            descriptors=tower.descriptors,
            hashes=tower.hashes,
            states=tower.states,
            tower=tower,
            source=source,
        )

    def read_entries(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        import torch

        if name != PROJECTION:
            return self.tower.read_entries(name, start, stop, into)
        if self.source is not None:
            return self.source.read_entries(name, start, stop, into)
        return torch.zeros(stop - start) if into is None else into.zero_()

    def without_projection(self) -> Checkpoint:
        return self.tower

    def digest(self) -> str:
        return self.tower.digest()

    def projection_digest(self) -> str:
        """`xxh3:` and 32 hex digits of the projection alone; raises ValueError if it is zeros."""
        if self.source is None:
            raise ValueError("zeros of a task vector have no digest")
        return self.source.only((PROJECTION,)).digest()

    @property
    def nbytes(self) -> int:
        """Bytes of the tower."""
        return self.tower.nbytes

    def expect_unchanged(self) -> None:
        for each in (self.tower, self.source):
            if each is not None:
                each.expect_unchanged()


BASE_PROJECTION = "base_projection"
"""The key under which a merge or a task vector says which visual projection of the base took part: the base's digest is that of its
tower."""


def projection_metadata(base: Checkpoint | None) -> dict[str, str]:
    """What a file says of the projection of a base as `encoders` gives it; nothing where no projection took part."""
    return {BASE_PROJECTION: base.projection_digest()} if isinstance(base, CompletedCheckpoint) else {}


def foreign_projection(metadata: Mapping[str, str], base: Checkpoint | None) -> str | None:
    """How the visual projection of the base differs from the one that a file was made with; None where it does not, or where the
    file does not say."""
    then, now = metadata.get(BASE_PROJECTION), projection_metadata(base).get(BASE_PROJECTION)
    return f"another visual projection ({now}) than {then}" if then and now and then != now else None


def own_encoder(opened: Checkpoint, base: Checkpoint) -> Checkpoint:
    """What is evaluated of a model: its vision tower, and its projection if that is not the one of the CLIP `base`."""
    encoder = opened.encoder()
    if encoder.has_projection and not _is_own(encoder, base.encoder()):
        return opened.without_projection()
    return encoder


def encoders(
    base: Checkpoint | None,
    models: Mapping[str, Checkpoint],
    *,
    wanted: bool | None = None,
    besides: Collection[str] = (),
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """What is merged of a base and its models: vision towers, and with them the projections if a model has one of its own,
    which is one that is not the base's.

    Then models without one have the base's. A note names those whose files have none. Where the base is no whole CLIP but an
    image encoder, its projection is a part of it in any case.

    Args:
        wanted: whether projections are merged; None leaves that to the models.
        besides: models that are not asked.
    """
    every = {name: each.encoder() for name, each in models.items()}
    having = {name: each for name, each in every.items() if each.has_projection}
    lacking = [name for name in every if name not in having]
    first = base if base is not None else next(iter(models.values()))
    is_part = first.has_projection and not first.is_whole_clip
    if base is not None:
        can = base.has_projection
    else:  # a task vector without one does not change it
        can = all(every[name].is_task_vector for name in lacking)
        if is_part and not can:
            return None, every  # whoever compares them says what is missing
    known = base.encoder() if base is not None and can else next(iter(having.values()), None)
    own = [name for name, each in having.items() if known is not None and _is_own(each, known)]
    asked = [name for name in own if name not in besides]
    if known is None or not can or not (is_part or asked if wanted is None else wanted):
        left_out = asked
        if not can and (own or any(not models[name].is_whole_clip for name in having)):
            left_out = [
                name for name in having if name not in besides
            ]  # there is nothing to compare them with
        if left_out:
            _warn_of_left_out(left_out, base, can=can)
        towers = {name: each.without_projection() for name, each in models.items()}
        return base and base.without_projection(), towers
    shape = known.entries[PROJECTION].shape
    if lacking and not all(every[name].is_task_vector for name in lacking):
        note(
            f"{quoted(lacking)}: no visual projection in the file, and other models have fine-tuned theirs: it has the base's"
        )
    whole = None if base is None else base.encoder()

    def completed(name: str, each: Checkpoint) -> Checkpoint:
        # an adapter stays one: its projection is that of what it is added to
        if name in own or (
            name in having and (is_part or whole is None or isinstance(each, AdaptedCheckpoint))
        ):
            return each
        return CompletedCheckpoint.of(each, None if each.is_task_vector else whole, shape)

    found = {name: completed(name, each) for name, each in every.items()}
    if whole is None or is_part:
        return whole, found
    return CompletedCheckpoint.of(whole, whole, shape), found


def _is_own(encoder: Checkpoint, base: Checkpoint) -> bool:
    """Whether the projection is another than the base's, by more than rounding to its dtype; of a task vector, whether it is
    not zero."""
    import torch

    if encoder.files == base.files and type(encoder) is type(base):
        return False
    ours = encoder.read(PROJECTION)
    if encoder.is_task_vector:
        return bool((ours != 0).any())
    if not base.has_projection or base.entries[PROJECTION].shape != tuple(ours.shape):
        return True
    theirs = base.read(PROJECTION)
    if ours.dtype == theirs.dtype or not (ours.is_floating_point() and theirs.is_floating_point()):
        return not ours.equal(theirs.to(ours.dtype))
    step = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
    return not torch.allclose(ours.float(), theirs.float(), rtol=step, atol=1e-7)


def _warn_of_left_out(models: Collection[str], base: Checkpoint | None, *, can: bool) -> None:
    one = len(models) == 1
    if can:
        why = "the merge that they are added to has the base's"
    elif base is not None:
        why = (
            f"the base has none; name the whole CLIP that {'it was' if one else 'they were'} fine-tuned from"
        )
    else:
        why = "other models have none, and there is no base that has one"
    verb = "has a visual projection" if one else "have visual projections"
    warnings.warn(
        f"{quoted(models)} {verb} of {'its' if one else 'their'} own, left out of the merge: {why}",
        MergecliWarning,
        stacklevel=3,
    )
