"""What several processes say: the same thing once, and nothing is kept silent."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mergecli.runtime.distributed import telling


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process of two, as torchrun starts them."""
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return tmp_path


def told(*texts: str) -> list[bool]:
    found: list[bool] = []
    for text in texts:
        with telling(text) as is_new:
            found.append(is_new)
    return found


def test_the_same_text_is_told_once_and_others_all(started: Path) -> None:
    assert told("a", "a", "b", "a", "b") == [True, False, True, False, False]


def test_a_process_alone_or_of_another_launcher_tells_everything(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert told("a", "a") == [True, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert told("a", "a") == [True, True]


def test_where_nothing_can_be_written_everything_is_told(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/nowhere/at/all/error.json")
    assert told("a", "a") == [True, True]


def test_what_one_could_not_tell_the_next_one_tells(started: Path) -> None:
    with pytest.raises(BrokenPipeError), telling("a"):
        raise BrokenPipeError
    assert told("a", "a") == [True, False]


def test_the_second_waits_until_the_first_has_told(started: Path) -> None:
    began, found = threading.Event(), list[bool]()

    def second() -> None:
        began.set()
        found.extend(told("a"))

    with telling("a") as is_new:
        other = threading.Thread(target=second)
        other.start()
        began.wait()
        other.join(0.2)
        assert (is_new, found) == (True, [])
    other.join()
    assert found == [False]
