"""Which license a merge has, of those of its models."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecli.results.licenses import forbids_changes, licenses, strictest
from mergecli.storage.sources import parse_source


@pytest.mark.parametrize(
    ("given", "chosen", "why"),
    [
        (["mit", "mit"], "mit", "`mit` is the license of every model that was merged."),
        (["mit", "apache-2.0"], "apache-2.0", "`apache-2.0` is the strictest of the models' licenses; the others are `mit`."),
        (["apache-2.0", "cc-by-nc-4.0", "MIT"], "cc-by-nc-4.0", "`cc-by-nc-4.0` is the strictest"),
        (["gpl-3.0", "lgpl-3.0"], "gpl-3.0", "`gpl-3.0` is the strictest"),
        (["gpl-3.0", "agpl-3.0"], "agpl-3.0", "`agpl-3.0` is the strictest"),
        (["gpl-3.0", "cc-by-nc-4.0"], None, "No license is given here, since none of `cc-by-nc-4.0` and `gpl-3.0` has the terms"),
        (["mit", "other"], None, "No license is given here, since the terms of `other` cannot be compared."),
        (["mit", None], None, "No license is given here, since that of `m1` is not known."),
    ],
)  # fmt: skip
def test_the_license_is_the_one_with_the_terms_of_all(
    given: list[str | None], chosen: str | None, why: str
) -> None:
    found, said = strictest({f"m{number}": license for number, license in enumerate(given)})
    assert found == chosen
    assert said.startswith(why)


def test_some_licenses_allow_no_merge() -> None:
    assert forbids_changes("cc-by-nc-nd-4.0")
    assert not forbids_changes("cc-by-nc-4.0")


def test_a_license_is_found_in_the_card_of_a_folder_and_in_no_other(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "own.safetensors"):
        (model / name).write_bytes(b"")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "own.safetensors").write_bytes(b"")
    sources = [
        parse_source(each, tmp_path)
        for each in ("model", "model/model.safetensors", "own.safetensors", "toy:base")
    ]
    assert list(licenses(sources).values()) == ["mit", "mit", None, "apache-2.0"]


def test_a_card_that_is_damaged_tells_no_license(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\n[\n---\n")
    assert licenses([parse_source("model", tmp_path), parse_source("nosuch", tmp_path)]) == {
        "model": None,
        "nosuch": None,
    }
