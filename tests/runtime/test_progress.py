"""Who is told how far the work is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mergecli
from mergecli.runtime.progress import AnyProgress, shown
from tests.conftest import World


def test_a_function_is_called_and_none_is_none() -> None:
    told: list[tuple[str, int, int]] = []
    with shown(lambda *each: told.append(each)) as report:
        assert report is not None
        report("merging", 1, 2)
    assert told == [("merging", 1, 2)]
    with shown(None) as report:
        assert report is None


@pytest.mark.parametrize("name", ["rich", "tqdm"])
def test_a_librarys_bar_is_drawn_for_each_kind_of_work(
    name: AnyProgress, capfd: pytest.CaptureFixture[str]
) -> None:
    with shown(name) as report:
        assert report is not None
        for done in range(1, 5):
            report(f"reading: file {done}", done, 4)
        report("merging", 3, 6)
    printed = "".join(capfd.readouterr())
    assert "reading: file 4" in printed
    assert "100%" in printed
    assert "merging" in printed
    assert "50%" in printed


@pytest.mark.parametrize("name", ["rich", "tqdm"])
def test_a_bar_ends_with_an_error_too(name: AnyProgress) -> None:
    with pytest.raises(ZeroDivisionError), shown(name) as report:
        assert report is not None
        report("merging", 1, 2)
        raise ZeroDivisionError
    with shown(name) as report:  # a library that still drew the first one would refuse
        assert report is not None
        report("merging", 1, 2)


def test_every_function_takes_the_name_of_a_library(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    mergecli.merge(
        world.files, base=world.base_file, method="average", output="average.safetensors", progress="tqdm"
    )
    assert "merging: 100%" in capfd.readouterr().err
    with pytest.raises(mergecli.UsageError) as caught:
        mergecli.merge(world.files, base=world.base_file, method="average", output="x", progress="rihc")  # pyright: ignore
    assert (
        str(caught.value)
        == "progress: expected a function or one of `rich`, `tqdm`, got `rihc` (did you mean `rich`?)"
    )
    assert not Path("x").exists()


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    message = "progress: tqdm is not installed\nhint: install it: `pip install tqdm`"
    with pytest.raises(mergecli.UsageError, match=message), shown("tqdm"):
        pass
