"""The database of a study: its address, processes that open it at once, and what is said when it fails."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sqlite3 import connect
from threading import Barrier

import pytest

from mergecli.runtime.errors import InputError, UsageError

pytest.importorskip("optuna", reason="the extra `search` is not installed")
pytest.importorskip("cmaes", reason="the extra `search` is not installed")

from mergecli.evaluation.study import Study
from mergecli.evaluation.study_database import check_storage, storage_url
from tests.evaluation.test_study import do, opened, space


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
