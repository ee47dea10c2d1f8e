"""Studies: what is proposed, how processes share trials, and what happens to those of processes that have gone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergecli.evaluation.search_space import Space
from mergecli.recipe.reading import recipe_of
from mergecli.results.statistics import Count
from mergecli.runtime.errors import InputError, UsageError

pytest.importorskip("optuna", reason="the extra `search` is not installed")
pytest.importorskip("cmaes", reason="the extra `search` is not installed")

from mergecli.evaluation.study import LOST, Study, Trial, check_sampler

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
