"""Mapped tensors: each chunk is looked at before it is first used."""

from __future__ import annotations

from pathlib import Path

import torch

from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.checksums import CHUNK_ENTRIES
from mergecli.storage.mapped import MappedTensor
from mergecli.storage.safetensors_writer import save_tensors
from tests.support.kept_files import flip


def test_damage_is_found_in_the_chunk_where_it_is_and_told_once(tmp_path: Path) -> None:
    file, values = tmp_path / "x.safetensors", torch.arange(3 * CHUNK_ENTRIES) % 251
    save_tensors({"a": values.to(torch.uint8)}, file, {}, checked=True)
    with open_checkpoint(file) as stored:
        mapped, start = MappedTensor(stored, "a"), stored.entries["a"].start
    flip(file, 8 * (start + CHUNK_ENTRIES + 9))
    assert mapped.damage(0, CHUNK_ENTRIES) is None
    found = mapped.damage(CHUNK_ENTRIES - 1, CHUNK_ENTRIES + 1)
    assert found is not None
    assert str(found[0]) == f"{file}: is damaged: `a` is not what was written"
    assert found[1] == [range(CHUNK_ENTRIES, 2 * CHUNK_ENTRIES)]
    assert mapped.damage(0, 3 * CHUNK_ENTRIES) is None
    mapped.tensor[CHUNK_ENTRIES + 9] = 7
    assert file.read_bytes()[start + CHUNK_ENTRIES + 9] != 7
