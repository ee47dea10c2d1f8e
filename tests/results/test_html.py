from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mergecli.results.cells import Column
from mergecli.results.report import report
from mergecli.results.tables import Table
from tests.results.test_report import THREE, TWO, result

HOSTILE = '<script>alert("x")</script>&\'"$title'
VOID = {"meta", "br", "img", "use", "input", "link"}


class Page(HTMLParser):
    """Counts what opens and closes, and keeps identifiers, references and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "data", "action", "srcset"):
                self.references.append(value or "")
            assert not name.startswith("on"), "a handler in an attribute"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open = self.open[:-2]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text() -> str:
    return report(
        THREE,
        normalized=True,
        intervals=True,
        against="b",
        reference="clip-vit-base-patch32-ta8",
        format="html",
    ).text("html")


def test_the_page_asks_for_nothing_from_outside(text: str) -> None:
    page = Page(text)
    assert "http" not in text
    assert re.findall(r"@import|//[a-z]|url\((?!#)", text) == []
    assert all(each.startswith(("#", "data:image/png;base64,")) for each in page.references)
    assert page.scripts == 1


def test_the_pictures_are_in_the_page_and_their_identifiers_do_not_collide(text: str) -> None:
    page = Page(text)
    assert text.count("<svg ") == 2
    assert len(set(page.ids)) == len(page.ids)
    assert {each[1:] for each in page.references if each[0] == "#"} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert "currentColor" in text


def test_the_page_has_the_notes_the_warnings_and_how_each_number_was_made(text: str) -> None:
    assert "<li>±: the longer side" in text
    assert "<strong>Warning:</strong> not as in `clip-vit-base-patch32-ta8`: the CLIP is `p`" in text
    assert text.count("<details>") == 3
    for fact in (
        "checkpoint digest",
        "data fingerprint",
        "<dd>float32</dd>",
        "<td>500</td>",
        "<th>templates</th>",
    ):
        assert fact in text
    assert "prefers-color-scheme: dark" in text


def test_numbers_are_sorted_by_all_their_digits(text: str) -> None:
    assert 'data-sort="0.6" title="0.6 [' in text
    assert text.count("<button ") == len(report(THREE, normalized=True, against="b", reference="clip-vit-base-patch32-ta8").columns)  # fmt: skip


def test_hostile_names_are_shown_and_not_run(tmp_path: Path) -> None:
    bad = result(HOSTILE, HOSTILE, mnist=0.5)
    bad = replace(
        bad, tasks={HOSTILE: replace(bad.tasks["mnist"], data={"source": HOSTILE, "fingerprint": HOSTILE})}
    )
    for transpose in (False, True):
        page = report([bad, *TWO], transpose=transpose, format="html", against=HOSTILE).text("html")
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert" in page
        assert Page(page).scripts == 1


def test_a_page_is_the_same_every_time() -> None:
    first, second = (report(TWO, format="html").text("html") for _ in range(2))
    assert first == second


def test_any_table_has_a_page() -> None:
    page = Table((Column("name"), Column("count", "count")), (("x", 1234),), title="A & B").text("html")
    assert "<title>A &amp; B</title>" in page
    assert 'data-sort="1234" title="1234">1,234<' in page
    assert "<figure" not in page
    assert "<details" not in page
    Page(page)


def test_published_rows_and_the_best_of_ours_are_marked() -> None:
    page = report(TWO, reference="clip-vit-base-patch32-ta8", reference_rows=True, format="html").text("html")
    assert page.count("<tr class=published>") == 15
    best = re.findall(r'class="number share best" data-sort="([^"]*)"', page)
    assert best == ["0.9", "0.9"]  # of `mnist` and of the average; `dtd` has only one of ours


def test_the_page_stands_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergecli.results import plots

    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    page = report(TWO, format="html").text("html")
    assert "<svg" not in page
    assert page.count("<details>") == 2
