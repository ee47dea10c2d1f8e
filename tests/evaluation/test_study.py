"""Studies: what is proposed, how processes share trials, and what happens to those of processes that have gone."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from sqlite3 import connect
from threading import Barrier
from typing import Any

import pytest

from mergecli.evaluation.search_space import Space
from mergecli.recipe.reading import recipe_of
from mergecli.results.statistics import Count
from mergecli.runtime.errors import InputError, UsageError

pytest.importorskip("optuna", reason="the extra `search` is not installed")
pytest.importorskip("cmaes", reason="the extra `search` is not installed")

from mergecli.evaluation.study import LOST, Study, Trial, check_sampler, check_storage, storage_url

WRITTEN = ("method.scaling_factor=0:1", "method.density=0.01:1.0:log")


def space(*written: str) -> Space:
    return Space.of(written or WRITTEN, recipe_of({"a": "toy:digits"}, base="toy:base", method="ties"))


def opened(
    path: Path, trials: int, sampler: str = "tpe", seed: int = 0, searched: Space | None = None, **facts: Any
) -> Study:
    return Study(f"sqlite:///{path}", "s", searched or space(), trials, sampler, seed, facts)


def value_of(trial: Trial) -> float:
    """A hill whose top is at 0.7 and 0.1."""
    values = trial.values
    return (
        1
        - (float(values["method.scaling_factor"]) - 0.7) ** 2
        - (float(values.get("method.density", 1)) - 0.1) ** 2
    )


def do(study: Study, most: int = 10**6) -> list[Trial]:
    """Claims and finishes trials until there are none, or so many batches are done."""
    while most and (claimed := study.claim()):
        most -= 1
        for trial in claimed:
            study.finish(replace(trial, objective=value_of(trial)))
    return study.trials


@pytest.mark.parametrize(
    ("sampler", "trials"),
    [
        ("tpe", 15),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("cmaes", 14), ("sobol", 3), ("random", 3), ("grid", 4))
        ),
    ],
)
def test_a_search_that_was_killed_proposes_what_it_would_have_proposed(
    tmp_path: Path, sampler: str, trials: int
) -> None:
    whole = do(opened(tmp_path / "whole.db", trials, sampler))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    killed = opened(tmp_path / "killed.db", trials, sampler)
    killed._owner["pid"] = gone.pid
    if trials > 4:
        do(killed, 1)
    for trial in killed.claim()[:2]:  # of this batch two are done, and the rest runs as the process is killed
        killed.finish(replace(trial, objective=value_of(trial)))
    again = do(opened(tmp_path / "killed.db", trials, sampler))
    assert again == whole
    assert [(each.slot, each.outcome) for each in again] == [(slot, "complete") for slot in range(trials)]
    if sampler == "tpe":
        assert sum(map(value_of, again[-5:])) > sum(map(value_of, again[:5])), "it has learned"


def test_two_processes_share_the_slots_of_one_study(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "s.db", 14), opened(tmp_path / "s.db", 14)
    other._owner["id"] = "other"
    first, second = one.claim(), other.claim()
    assert ([each.slot for each in first], [each.slot for each in second]) == ([*range(10)], [10, 11, 12, 13])
    assert one.others == 14
    for study, claimed in ((one, first), (other, second)):
        for trial in claimed:
            study.finish(replace(trial, objective=value_of(trial)))
    while do(one, 1) and do(other, 1) and len(one.trials) < 14:
        pass
    assert [each.slot for each in other.trials] == list(range(14))
    assert len({str(each.values) for each in one.trials}) == 14


def test_of_two_that_claim_a_slot_the_first_has_it(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "s.db", 3), opened(tmp_path / "s.db", 3)
    assert one._add(0, {"method.scaling_factor": 0.5})
    assert not other._add(0, {"method.scaling_factor": 0.6})
    assert [each.values for each in other.trials] == [{"method.scaling_factor": 0.5}]
    assert other.others == 1


def test_trials_of_a_machine_that_gives_no_sign_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = opened(tmp_path / "s.db", 2)
    away._owner["host"] = "elsewhere"
    assert len(away.claim()) == 2
    here = opened(tmp_path / "s.db", 2)
    assert here.claim() == []
    import time

    later = time.time() + LOST - 10
    monkeypatch.setattr(time, "time", lambda: later)
    away.sign()
    monkeypatch.setattr(time, "time", lambda: later + 60)
    assert here.claim() == [], "it gave a sign"
    monkeypatch.setattr(time, "time", lambda: later + LOST + 60)
    assert [each.slot for each in here.claim()] == [0, 1]


def test_a_trial_that_is_given_up_is_free_and_one_that_is_pruned_is_not(tmp_path: Path) -> None:
    study = opened(tmp_path / "s.db", 3, "random")
    claimed = study.claim()
    for trial in claimed[:2]:
        study.tell(replace(trial, objective=0.25 + trial.slot, counts={"a": Count(1, 2)}), 1)
    assert study.middle(1) == 1.25
    study.prune(claimed[0])
    study.give_up(claimed[1:])
    assert [(each.slot, each.outcome, each.objective) for each in study.trials] == [(0, "pruned", 0.25)]
    assert study.trials[0].counts == {"a": Count(1, 2)}
    assert study.kept() == "1 of 3 trials are kept"
    assert [each.values for each in study.claim()] == [each.values for each in claimed[1:]]


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "s.db", 3, objective="average", split="validation")
    with pytest.raises(UsageError) as error:
        opened(tmp_path / "s.db", 3, objective="worst", split="validation")
    assert error.value.message == (
        f"sqlite:///{tmp_path}/s.db: the study `s` is another search:\n  objective: average, not worst"
    )
    (tmp_path / "no.db").write_text("not a database")
    with pytest.raises(InputError) as failed:
        opened(tmp_path / "no.db", 3)
    assert failed.value.message.startswith(f"sqlite:///{tmp_path}/no.db: cannot open the study: ")


@pytest.mark.slow
def test_processes_that_begin_one_study_at_the_same_moment_share_it(tmp_path: Path) -> None:
    together = Barrier(4)

    def begin(_: int) -> Study:
        together.wait()
        return opened(tmp_path / "s.db", 3, split="validation")

    with ThreadPoolExecutor(4) as threads:
        studies = list(threads.map(begin, range(4)))
    assert len(studies[0].claim()) == 3
    assert [each.others for each in studies] == [3, 3, 3, 3]


def test_a_database_that_fails_in_the_middle_is_named(tmp_path: Path) -> None:
    study = opened(tmp_path / "s.db", 3)
    with connect(tmp_path / "s.db") as database:
        database.execute("DROP TABLE trials")
    with pytest.raises(InputError) as error:
        study.claim()
    assert (error.value.message, error.value.hint) == (
        f"sqlite:///{tmp_path}/s.db: the database of the study fails: (sqlite3.OperationalError) no such table: trials",
        "the same command goes on when the database is back",
    )


def test_the_more_important_setting_is_named_first(tmp_path: Path) -> None:
    searched = space("method.scaling_factor=0:1", "method.zero_sign=zero,majority")
    study = opened(tmp_path / "s.db", 10, "random", searched=searched)
    do(study)
    assert next(iter(study.importance())) == "method.scaling_factor"
    assert opened(tmp_path / "none.db", 2).importance() == {}


def test_samplers_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as error:
        check_sampler("tpee", space())
    assert error.value.message == (
        "--sampler: expected one of tpe, sobol, cmaes, random, grid, got `tpee` (did you mean `tpe`?)"
    )
    with pytest.raises(UsageError) as error:
        check_sampler("cmaes", space("method.zero_sign=zero,majority"))
    assert error.value.message == "--sampler cmaes: needs a range to search"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError) as error:
        check_sampler("tpe", space())
    assert (error.value.message, error.value.hint) == (
        "a search needs optuna",
        "pip install 'mergecli[search]'",
    )


def test_an_address_that_is_none_and_a_missing_driver_are_named_without_the_password() -> None:
    for storage, said in {
        "nosuch://me:se/cret@host/db": "nosuch://me:***@host/db: expected the address of a database, such as "
        "postgresql://user@host/db, or a file: Can't load plugin: sqlalchemy.dialects:nosuch",
        "postgresql://me:secret@host:port/db": "postgresql://me:***@host:port/db: expected the address of a database, such as "
        "postgresql://user@host/db, or a file: invalid literal for int() with base 10: 'port'",
        "oracle+oracledb://me:secret@host/db": "oracle+oracledb://me:***@host/db: cannot talk to this database: "
        "No module named 'oracledb'",
        "oracle+oracledb://host/db?user=me&password=secret": "oracle+oracledb://host/db?user=me&password=***: "
        "cannot talk to this database: No module named 'oracledb'",
    }.items():
        with pytest.raises(UsageError) as error:
            check_storage(storage)
        assert error.value.message == f"--storage {said}"
    assert error.value.hint == "pip install 'oracledb'"
    check_storage("sqlite:///s.db")


def test_a_storage_is_an_address_or_a_file(tmp_path: Path) -> None:
    assert storage_url("postgresql://host/db", tmp_path) == "postgresql://host/db"
    assert storage_url("x.db", tmp_path) == "sqlite:///x.db"
    odd = tmp_path / "100 % of #1?"
    odd.mkdir()
    assert do(Study(storage_url(None, odd), "s", space(), 1, "random", 0, {}))[0].outcome == "complete"
    assert [each.name for each in odd.iterdir()] == ["study.db"]
    assert storage_url(None, tmp_path) == f"sqlite:///{tmp_path}{os.sep}study.db"
