"""Tables on terminals of several widths."""

from __future__ import annotations

import re

import pytest

from mergecli.cli.layout import laid_out, prose
from mergecli.results.cells import Cell, Column, Estimate
from mergecli.results.tables import Table
from tests.conftest import Run

TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
MODELS = ("pretrained", "average", "ties", "task_arithmetic")


def results(models: tuple[str, ...] = MODELS, *, intervals: bool = False) -> Table:
    """A report of those models on eight tasks; every number is another one."""

    def cell(row: int, column: int) -> Cell:
        value = 0.501 + 0.01 * row + 0.001 * column
        return Estimate(value, value - 0.02, value + 0.03) if intervals else value

    columns = (Column("model"), Column("method"), *(Column(task, "percent") for task in TASKS))
    rows = tuple(
        (name, f"m{row}", *(cell(row, column) for column in range(len(TASKS))))
        for row, name in enumerate(models)
    )
    return Table(columns, rows)


def drawn(table: Table, width: int | None) -> list[str]:
    """The lines, none of which is wider."""
    lines = laid_out([table], width).lines
    assert width is None or max(map(len, lines)) <= width
    assert lines[0] == lines[-1] == ""
    return [*lines[1:-1]]


def numbers(lines: list[str]) -> list[str]:
    return sorted(each for line in lines for each in re.findall(r"\d+\.\d(?: ±\d+\.\d)?", line))


def test_a_table_that_fits_has_wide_gaps_and_numbers_at_the_right() -> None:
    table = Table((Column("model"), Column("mnist", "percent")), (("one", 0.75), ("fine-tuned", None)))
    assert drawn(table, 80) == drawn(table, None) == [
        " model        mnist",
        " ──────────────────",
        " one           75.0",
        " fine-tuned       -",
    ]  # fmt: skip


def test_headings_are_wrapped_between_words_and_never_in_front_of_a_number() -> None:
    table = Table(
        (Column("model"), Column("stanford-cars (diff.)", "points"), Column("lr=1e-4", "number")),
        (("fine-tuned", 0.0123, 0.5),),
    )
    assert drawn(table, 38) == [
        "             stanford-",
        "                  cars",
        " model         (diff.)  lr=1e-4",
        " ──────────────────────────────",
        " fine-tuned       +1.2   0.5000",
    ]


def test_a_report_that_is_too_wide_has_its_tasks_as_rows() -> None:
    assert drawn(results(), 80)[:4] == [
        "                 pretrained   average   ties   task_arithmetic",
        " ─────────────────────────────────────────────────────────────",
        " method                  m0        m1     m2                m3",
        " sun397                50.1      51.1   52.1              53.1",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("intervals", [False, True])
@pytest.mark.parametrize("models", [MODELS, tuple(f"a_long_name_of_a_model-{each}" for each in range(12))])
def test_every_number_is_whole_on_a_terminal_of_any_width(
    width: int, intervals: bool, models: tuple[str, ...]
) -> None:
    table = results(models, intervals=intervals)
    assert numbers(drawn(table, width)) == numbers(drawn(table, None))


def test_a_table_that_fits_no_way_is_continued_below_in_parts_of_one_size() -> None:
    names = tuple(f"task{each}" for each in range(6))
    table = Table(
        (Column(""), *(Column(name, "number") for name in names)),
        tuple((name, *[0.25] * 6) for name in names),
    )
    lines = drawn(table, 40)
    assert [line.split() for line in lines if "task" in line and "0." not in line] == [
        [*names[:3]],
        [*names[3:]],
    ]
    assert len(lines) == 2 * (2 + 6) + 1


def test_texts_are_wrapped_between_words_and_the_widest_gets_the_room() -> None:
    table = Table(
        (Column("method"), Column("what it does"), Column("needs"), Column("reads", "count")),
        (("dare", "entries of the task vectors dropped at random, then another method", "base", 1),),
    )
    assert drawn(table, 50) == [
        " method  what it does                 needs  reads",
        " ─────────────────────────────────────────────────",
        " dare    entries of the task vectors  base       1",
        "         dropped at random, then",
        "         another method",
    ]


def test_what_is_the_same_in_every_row_is_told_once_where_room_is_short() -> None:
    table = Table(
        (Column("source"), Column("bytes", "count"), Column("host")),
        (("hf:org/one", 1000, "huggingface.co"), ("hf:org/two", 2000, "huggingface.co")),
    )
    laid = laid_out([table], 30)
    assert [*laid.lines[1:-1]] == [
        " source       bytes",
        " ──────────────────",
        " hf:org/one   1,000",
        " hf:org/two   2,000",
    ]
    assert laid.notes == ("`host` is `huggingface.co` in every row",)
    assert laid_out([table], 60).notes == ()


def test_columns_that_a_table_can_do_without_go_from_all_its_parts() -> None:
    columns = (Column("task"), Column("data", optional=True), Column("what it is"))
    short = Table(columns, (("a", "toy:a", "digits"),), title="short")
    wide = Table(columns, (("b", "hf:some-organisation/a-data-set", "letters"),), title="wide")
    laid = laid_out([short, wide], 40)
    assert [*laid.lines] == [
        "", " short", " task   what it is", " ─────────────────", " a      digits", "",
        " wide", " task   what it is", " ─────────────────", " b      letters", "",
    ]  # fmt: skip
    assert laid.notes == ("there is no room for `data`, which a wider terminal shows",)
    assert [laid.lines[line][start:stop] for line, start, stop in laid.bold] == [
        "short", "task   what it is", "wide", "task   what it is",
    ]  # fmt: skip


def test_a_row_that_does_not_fit_is_a_line_for_each_cell() -> None:
    table = Table(
        (Column("fact"), Column("value")), (("digest", "xxh3:" + "0" * 32), ("kind", "task vector"))
    )
    assert drawn(table, 40) == [" digest", "   xxh3:" + "0" * 32, " kind", "   task vector"]


def test_only_a_word_longer_than_the_terminal_loses_its_middle_and_that_is_said() -> None:
    table = Table((Column("fact"), Column("value")), (("path", "/a/very/long/path/of/a/file"),))
    laid = laid_out([table], 20)
    assert [*laid.lines[1:-1]] == [" path", "   /a/very/…f/a/file"[:21]]
    assert laid.notes == (
        "long names are shown without their middle, and whole on a wider terminal or in a pipe",
    )


def test_wide_characters_take_two_columns() -> None:
    table = Table((Column("model"), Column("数字", "percent")), (("合并", 0.5), ("a", 0.25)))
    assert drawn(table, 80) == [" model   数字", " ────────────", " 合并    50.0", " a       25.0"]


def test_names_that_would_look_alike_are_numbered() -> None:
    rows = tuple((f"{'a' * 30}{each}{'b' * 30}", *[0.5] * 4) for each in "xy")
    table = Table((Column("model"), *(Column(f"t{each}", "percent") for each in range(4))), rows)
    lines = drawn(table, 30)
    assert [line.split()[0] for line in lines if "aaa" in line][:2] == ["1", "2"]


def test_the_best_numbers_are_bold_and_a_rule_stands_before_the_ceiling() -> None:
    columns = (Column("model"), *(Column(f"task{each}", "percent") for each in range(3)))
    rows = (("one", 0.5, 0.25, 0.125), ("two", 0.375, 1.0, 0.5), ("fine-tuned", 1.0, 1.0, 1.0))
    best = frozenset({(0, 1), (1, 2), (1, 3)})
    table = Table(columns, rows, kinds=("merge", "merge", "ceiling"), best=best)
    for width in (80, 30, 20):
        laid = laid_out([table], width)
        shown = [laid.lines[line][start:stop] for line, start, stop in laid.bold]
        assert [each for each in shown if "." in each] == ["50.0", "100.0", "50.0"]
    lines = drawn(table, 80)
    assert [number for number, line in enumerate(lines) if "─" in line] == [1, 4]


def test_a_table_without_rows_is_its_headings() -> None:
    assert drawn(Table((Column("kind"), Column("bytes", "count")), ()), 80) == [
        " kind   bytes",
        " ────────────",
    ]


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("command", [("methods",), ("tasks",), ("info", "toy:base"), ("tasks", "ta8")])
def test_what_newcomers_run_first_fits(run: Run, command: tuple[str, ...], width: int) -> None:
    ended = run(*command, "--format", "table", COLUMNS=width)
    assert ended.status == 0
    assert max(map(len, ended.out.splitlines())) <= width
    assert "…" not in ended.out


def test_methods_are_grouped_by_what_they_need(run: Run) -> None:
    from mergecli import methods

    out = run("methods", "--format", "table", COLUMNS=80).out
    titles = [f" {kind}: {needs}" for kind, needs in methods.KINDS.items()]
    assert [line for line in out.splitlines() if line in titles] == titles
    named = [
        line.split()[0] for line in out.splitlines() if line.split() and line.split()[0] in methods.names()
    ]
    assert sorted(set(named)) == [*methods.names()]


def test_tasks_are_grouped_by_the_set_that_they_come_with(run: Run) -> None:
    out = run("tasks", "--format", "table", COLUMNS=80).out
    assert [line.split(":")[0].strip() for line in out.splitlines() if ": " in line] == [
        "ta8", "tall14", "tall20", "toy8",
    ]  # fmt: skip


def test_long_lines_of_prose_are_wrapped_with_the_rest_of_their_paragraph() -> None:
    text = (
        "theta = a + b,  entry by entry\n\nEntries that tie with the smallest are kept:\nmore than that. And\nso on.\n\n"
        "paper  Yadav et al., TIES-Merging, NeurIPS 2023\n    of the paper it is that is meant\nshort\nlines"
    )
    assert prose(text, 30).splitlines() == [
        "theta = a + b,  entry by entry", "", "Entries that tie with the", "smallest are kept: more than", "that. And so on.", "",
        "paper  Yadav et al.,", "       TIES-Merging, NeurIPS", "       2023", "    of the paper it is that is", "    meant",
        "short", "lines",
    ]  # fmt: skip
    assert prose(text, 200).splitlines() == text.splitlines()


def test_a_method_is_wrapped_on_a_terminal_and_not_in_a_pipe(run: Run) -> None:
    narrow = run("methods", "ties", COLUMNS=40).out
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.split() == run("methods", "ties").out.split()
