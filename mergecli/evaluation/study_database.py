"""The database that the trials of a search lie in: its address, how it is opened, and what is said when it fails.

Only this file and `study.py` import Optuna.
"""

from __future__ import annotations

import logging
import random
import re
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mergecli.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

_ATTEMPTS = 20
"""How often a process tries to open a study that others begin at the same moment."""
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "mysqldb": "mysqlclient"}
"""Driver -> the package that has it, where that is called otherwise."""


def check_storage(url: str) -> None:
    """Raises UsageError if this is no address of a database, or the package that talks to it is missing."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    shown = _without_password(url)
    try:
        dialect = make_url(url).get_dialect()
    except (SQLAlchemyError, ValueError) as error:
        raise UsageError(
            f"--storage {shown}: expected the address of a database, such as postgresql://user@host/db, or a file: "
            f"{_first_line(error)}"
        ) from error
    try:
        dialect.import_dbapi()
    except ImportError as error:
        package = _DRIVERS.get(dialect.driver, dialect.driver)
        raise UsageError(
            f"--storage {shown}: cannot talk to this database: {_first_line(error)}",
            f"pip install '{package}'",
        ) from error


def storage_url(storage: str | None, folder: Path) -> str:
    """The address of the database: by default a file in the output's folder."""
    if storage is not None and "://" in storage:
        return storage
    return f"sqlite:///{quote(str(storage or folder / 'study.db'))}"


class Database:
    """An SQLite file or a server; as text its address, without the password."""

    storage: RDBStorage

    def __init__(self, url: str) -> None:
        self._url = url

    def __str__(self) -> str:
        return _without_password(self._url)

    def open(self, name: str, facts: Mapping[str, Any]) -> tuple[optuna.Study, Mapping[str, Any]]:
        """The study of that name and its facts; it is begun with these if there is none.

        Raises:
            InputError: the database cannot be opened.
        """
        with quiet():
            import optuna
            from sqlalchemy.exc import IntegrityError

            attempts = _ATTEMPTS
            while True:
                attempts -= 1
                try:
                    self.storage = optuna.storages.RDBStorage(self._url, engine_kwargs=_engine(self._url))
                    study = optuna.create_study(
                        storage=self.storage, study_name=name, direction="maximize", load_if_exists=True
                    )
                    known = study.user_attrs.get("mergecli")
                    if known is None:
                        study.set_user_attr("mergecli", dict(facts))
                    return study, known or dict(facts)
                except Exception as error:
                    # another process has just made the table or the row that this one was about to make
                    exists = isinstance(_cause(error), IntegrityError) or "already exists" in str(error)
                    if not exists or not attempts:
                        raise InputError(
                            f"{self}: cannot open the study: {_first_line(error)}",
                            "`--storage` names another",
                        ) from error
                    time.sleep(random.uniform(0.05, 0.2))

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Raises InputError if the database fails, as one that has gone."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with quiet():
                yield
        except (SQLAlchemyError, StorageInternalError) as error:
            raise InputError(
                f"{self}: the database of the study fails: {_first_line(error)}",
                "the same command goes on when the database is back",
            ) from error


def _engine(url: str) -> dict[str, Any]:
    """SQLite lets one process write at a time: the others wait. A server may have closed a connection between two trials: it is
    tried before it is used."""
    return {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def _without_password(url: str) -> str:
    hidden = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&\s]*", r"\1***", hidden)


def _cause(error: BaseException) -> BaseException:
    """What the database said; Optuna wraps it where it wrote."""
    from optuna.exceptions import StorageInternalError

    return error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error


def _first_line(error: BaseException) -> str:
    error = _cause(error)
    return _without_password((str(error).splitlines() or [type(error).__name__])[0])


@contextmanager
def quiet() -> Generator[None]:
    """What Optuna and its database log is dropped, and so are warnings of what is experimental; errors are raised as they are."""
    from optuna import logging as optuna_logging

    before = optuna_logging.get_verbosity()
    optuna_logging.set_verbosity(optuna_logging.CRITICAL)
    alembic = logging.getLogger("alembic")
    level = alembic.level
    alembic.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        alembic.setLevel(level)
        optuna_logging.set_verbosity(before)
