from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest

from mergecli.results.cells import Column, Estimate, Shows
from mergecli.results.tables import FORMATS, Table
from mergecli.runtime.errors import UsageError

PLAIN = Table((Column("model"), Column("mnist", "percent")), (("one", 0.75), ("two", None)))
ESTIMATES = Table(
    (Column("model"), Column("mnist", "percent"), Column("mnist (diff.)", "points")),
    (
        ("one", Estimate(0.75, 0.7, 0.78), Estimate(0.01, -0.02, 0.04, False)),
        ("two", Estimate(0.74, 0.7, 0.75), None),
    ),
    notes=("how to read it",),
    warnings=("what is wrong",),
)


def test_latex_escapes_what_it_must_and_uses_booktabs() -> None:
    text = Table((Column("a_b"), Column("x", "percent")), (("50 % & more", 0.123),)).text("latex")
    assert text.splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"a\_b & x \\", r"\midrule", r"50 \% \& more & 12.3 \\", r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip
    assert r"\textasciitilde{}\textasciicircum{}\{\textbackslash " in Table(
        (Column("a"),), (("~^{\\",),)
    ).text("latex")


def test_people_see_the_longer_side_of_an_interval() -> None:
    lines = ESTIMATES.text("md").splitlines()
    assert lines[2:] == [
        "| one | 75.0 ±5.0 | +1.0 ±3.0 |", "| two | 74.0 ±4.0 | - |", "", "- warning: what is wrong",
        "- how to read it",
    ]  # fmt: skip
    latex = ESTIMATES.text("latex").splitlines()
    assert latex[4] == r"one & 75.0 $\pm$5.0 & +1.0 $\pm$3.0 \\"
    assert latex[-2:] == ["% warning: what is wrong", "% how to read it"]


def test_programs_get_both_ends_of_an_interval_in_columns_of_their_own() -> None:
    rows = list(csv.reader(ESTIMATES.text("csv").splitlines()))
    assert rows == [
        ["model", "mnist", "mnist low", "mnist high", "mnist (diff.)", "mnist (diff.) low", "mnist (diff.) high",
         "mnist (diff.) significant"],
        ["one", "0.75", "0.7", "0.78", "0.01", "-0.02", "0.04", "false"],
        ["two", "0.74", "0.7", "0.75", "", "", "", ""],
    ]  # fmt: skip
    one, two = json.loads(ESTIMATES.text("json"))
    assert (one["mnist high"], one["mnist (diff.) significant"]) == (0.78, False)
    assert (two["mnist low"], two["mnist (diff.) low"]) == (0.7, None)


@pytest.mark.parametrize(
    ("significant", "shows", "text"),
    [
        (False, "interval", "+2.7 ±2.4"), (False, "test", "+2.7 n.s."), (True, "test", "+2.7"), (False, "number", "+2.7"),
    ],
)  # fmt: skip
def test_a_number_has_one_sign_of_its_certainty(significant: bool, shows: Shows, text: str) -> None:
    value = Estimate(0.027, 0.003, 0.051, significant, shows)
    assert Column("x", "points").text(value) == text
    rows = Table((Column("x", "points"),), ((value,),)).text("tsv").splitlines()
    assert rows[1] == f"0.027\t0.003\t0.051\t{str(significant).lower()}"


def test_a_probability_has_three_decimals_or_is_below_them() -> None:
    shown = [Column("p", "probability").text(each) for each in (1.0, 0.0421, 0.001, 0.00099, 0.0)]
    assert shown == ["1.000", "0.042", "0.001", "<0.001", "<0.001"]


RANKED = Table(
    (Column("model"), Column("mnist", "percent", better="higher")),
    (("a_b", 0.75), ("top", 0.9), ("c", 0.5)),
    kinds=("merge", "ceiling", "merge"),
    best=frozenset({(0, 1)}),
)


def test_the_best_number_is_bold_and_the_ceiling_between_rules() -> None:
    assert RANKED.text("md").splitlines() == [
        "| model | mnist |", "| :-- | --: |", "| a_b | **75.0** |", "|   |   |", "| top | 90.0 |", "|   |   |", "| c | 50.0 |",
    ]  # fmt: skip
    assert RANKED.text("latex").splitlines()[1:-2] == [
        r"\toprule", r"model & mnist \\", r"\midrule", r"a\_b & \textbf{75.0} \\", r"\midrule", r"top & 90.0 \\",
        r"\midrule", r"c & 50.0 \\",
    ]  # fmt: skip
    page = RANKED.text("html")
    assert '<tr class=ceiling><th scope="row" title="top">' in page
    assert '<td class="number share best" data-sort="0.75"' in page
    assert page.count(" best") == 1
    assert "75.0" not in RANKED.text("tsv")


def test_what_is_bold_and_apart_stays_so_when_transposed() -> None:
    turned = RANKED.transposed()
    assert turned.text("md").splitlines()[2] == "| mnist | **75.0** | 90.0 | 50.0 |"
    assert turned.text("latex").splitlines()[0] == r"\begin{tabular}{lr|r|r}"
    assert turned.text("html").count(" apart") == 2
    last = replace(RANKED, rows=RANKED.rows[:2], kinds=RANKED.kinds[:2]).transposed()
    assert last.text("latex").splitlines()[0] == r"\begin{tabular}{lr|r}"


def test_no_number_is_minus_nothing() -> None:
    assert Column("x", "points").text(-0.0001) == "+0.0"
    assert Column("x", "percent").text(-0.0001) == "0.0"


def test_transposed_columns_become_rows_and_cells_keep_their_units() -> None:
    turned = ESTIMATES.transposed()
    assert turned.text("md").splitlines()[:4] == [
        "|  | one | two |",
        "| :-- | --: | --: |",
        "| mnist | 75.0 ±5.0 | 74.0 ±4.0 |",
        "| mnist (diff.) | +1.0 ±3.0 | - |",
    ]
    assert json.loads(turned.text("json"))[0] == {
        "name": "mnist", "one": 0.75, "one low": 0.7, "one high": 0.78, "one significant": None,
        "two": 0.74, "two low": 0.7, "two high": 0.75,
    }  # fmt: skip
    assert (turned.notes, turned.warnings) == (ESTIMATES.notes, ESTIMATES.warnings)


def test_models_of_one_name_stay_apart_when_transposed() -> None:
    table = Table((Column("model"), Column("x", "percent")), (("a", 0.1), ("a", 0.2), ("a (2)", 0.3)))
    assert json.loads(table.transposed().text("json")) == [
        {"name": "x", "a": 0.1, "a (2)": 0.2, "a (2) (2)": 0.3}
    ]


@pytest.mark.parametrize("form", [each for each in FORMATS if each != "table"])
def test_every_format_shows_every_cell_and_ends_a_line(form: str) -> None:
    text = PLAIN.text(form)
    assert text.endswith("\n")
    assert "one" in text
    assert ("0.75" if form in ("tsv", "csv", "json") else "75.0") in text


def test_a_tsv_cell_with_a_tab_is_quoted_and_read_back() -> None:
    table = Table((Column("model"),), (("a\tb",),))
    assert list(csv.reader(table.text("tsv").splitlines(), delimiter="\t"))[1] == ["a\tb"]


def in_a_cell(name: str, form: str) -> str:
    """How a name is written in a table of that form."""
    text = Table((Column("model"), Column("x", "percent")), ((name, 0.5),)).text(form)
    if form in ("csv", "tsv"):
        return list(csv.reader(io.StringIO(text), delimiter="," if form == "csv" else "\t"))[1][0]
    if form == "md":
        return text.splitlines()[2].removeprefix("| ").removesuffix(" | 50.0 |")
    return text.splitlines()[4].partition(" & 50.0")[0]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a\nb|c", r"a\\nb\|c"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a&amp;b", "a&amp;amp;b"),
        ("![x](http://a.example/b)", r"!\[x\](http://a.example/b)"),
        ("`code`", r"\`code\`"),
        ("**bold** ~~no~~", r"\*\*bold\*\* \~\~no\~\~"),
        ("__init__", r"\_\_init\_\_"),
        ("task_arithmetic", "task_arithmetic"),
        ("ties[b]", r"ties\[b\]"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_a_markdown_cell_is_one_line_of_the_names_own_characters(name: str, written: str) -> None:
    assert in_a_cell(name, "md") == written


def test_markdown_footnotes_are_lines_without_html() -> None:
    table = replace(ESTIMATES, notes=("`a<b>` & more\n# x",), warnings=())
    assert table.text("md").splitlines()[-1] == r"- `a&lt;b&gt;` &amp; more\n# x"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("=HYPERLINK(A1)", "'=HYPERLINK(A1)"), ("+1", "'+1"), ("-1+2", "'-1+2"), ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"), ("\uff1d1", "'\uff1d1"), ("-", "-"), ("a=1", "a=1"), ("'=1", "'=1"), ("a\r\nb", r"a\r\nb"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_cell_from_a_name_is_a_text_to_a_spreadsheet(form: str, name: str, written: str) -> None:
    assert in_a_cell(name, form) == written


def test_numbers_of_csv_files_keep_their_signs() -> None:
    table = Table((Column("=model"), Column("x", "points")), (("a", -0.5), ("b", Estimate(-1.0, -2.0, 3.0))))
    assert table.text("csv") == "'=model,x,x low,x high\na,-0.5,,\nb,-1,-2,3\n"


def test_a_latex_row_may_begin_with_a_bracket_or_a_star() -> None:
    assert in_a_cell("[b]", "latex") == "{}[b]"
    assert in_a_cell("*", "latex") == "{}*"
    assert in_a_cell("a\nb", "latex") == r"a\textbackslash nb"


def test_latex_shows_the_signs_that_its_text_font_lacks() -> None:
    assert in_a_cell("a<b>|c", "latex") == "a$<$b$>$$|$c"
    assert "<0.001" not in Table((Column("p", "probability"),), ((0.0,),)).text("latex").replace(
        "$<$0.001", ""
    )


@pytest.mark.parametrize("form", [each for each in FORMATS if each != "table"])
def test_no_control_character_of_a_name_is_in_any_format(form: str) -> None:
    name = "a\x1b[31m\r\x07\x7f\x9b\u202e\u2028\udcff"
    text = Table((Column(name), Column(name, "percent")), ((name, 0.5),), name, (name,), (name,)).text(form)
    assert [each for each in text if not each.isprintable() and each not in "\n\t"] == []
    assert "31m" in text


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one of table, tsv, csv, json, md, latex, html, got `xls`"):
        PLAIN.text("xls")
