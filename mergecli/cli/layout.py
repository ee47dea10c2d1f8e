"""How a table is laid out on a terminal: within its width, and with every word and every number whole.

The first of these that fits is taken: the table as it is; headings and texts wrapped between words; without columns that
say the same in every row, or that the table can do without; rows and columns swapped; parts of the table below each other; a line
for each cell. Only a word that is longer than there is room loses its middle. What is left out is told in a note.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from rich.cells import cell_len, set_cell_size

from mergecli.results.tables import Table
from mergecli.runtime.errors import quoted
from mergecli.runtime.visible import visible

T = TypeVar("T")

LEAST = 20
"""No terminal is taken to be narrower."""
PROSE = 22
"""So wide a text stays at least when it is wrapped; on a narrow terminal less."""
_GAP, _NARROW_GAP = 3, 2
_WORDS = re.compile(r"(?<= )(?=[^ ])")
_PIECES = re.compile(r"(?<= )(?=[^ ])|(?<=[-_/])(?=[^\W\d_])")
"""Where a text may be wrapped, and where a heading, which is often a name; neither is inside a number."""


@dataclass(frozen=True)
class Laid:
    """A table on a terminal."""

    lines: tuple[str, ...]
    bold: tuple[tuple[int, int, int], ...] = ()
    """(line, start, stop) of the texts that are bold: headings, and the best numbers."""
    notes: tuple[str, ...] = ()
    """What is left out."""


def laid_out(tables: Sequence[Table], width: int | None, rule: str = "─") -> Laid:
    """The tables below each other, with empty lines around and between them; of any width if that is None.

    Several tables are of the same columns: what one has no room for is left out of all.
    """
    bound = sys.maxsize if width is None else max(width, LEAST)
    grids = [_Grid.of(each, bound, rule) for each in tables]
    notes: list[str] = []
    if len(grids) == 1 and not grids[0].fitted():
        grids[0], notes = grids[0].without_repetition()
    leaner = [each.leaner() for each in grids]
    can_fit = [each[-1].fitted() is not None for each in leaner]
    fewest = next(
        (
            count
            for count in range(len(leaner[0]))
            if all(each[count].fitted() for each, can in zip(leaner, can_fit, strict=True) if can)
        ),
        0,
    )
    if any(can_fit) and (gone := [each for each in grids[0].heads if each not in leaner[0][fewest].heads]):
        notes.append(f"there is no room for {quoted(gone)}, which a wider terminal shows")
    parts = [
        (each[fewest].fitted() if can else None) or each[0].otherwise()
        for each, can in zip(leaner, can_fit, strict=True)
    ]
    laid = _below([Laid(("",)), *parts], after="")
    return replace(laid, notes=(*notes, *laid.notes))


@dataclass(frozen=True)
class _Grid:
    """The texts of some columns of a table."""

    table: Table
    chosen: tuple[int, ...]
    """Which of the table's columns."""
    heads: tuple[str, ...]
    columns: tuple[Sequence[str], ...]
    is_text: tuple[bool, ...]
    whole: tuple[int, ...]
    """How wide the cells of each column are."""
    least: tuple[int, ...]
    """How wide each column must be for its words and numbers to stay whole."""
    width: int
    rule: str

    @classmethod
    def of(cls, table: Table, width: int, rule: str) -> _Grid:
        """All columns of a table, for a terminal of that width."""
        heads = tuple(visible(each.name) for each in table.columns)
        columns = tuple(
            tuple(visible(column.text(row[index])) for row in table.rows) for index, column in enumerate(table.columns)
        )  # fmt: skip
        is_text = tuple(each.unit == "text" for each in table.columns)
        whole = tuple(max(map(cell_len, cells), default=0) for cells in columns)
        prose = min(PROSE, width // 2 - 2)
        widest = max((each for each, text in zip(whole[1:], is_text[1:], strict=True) if text), default=0)
        least: list[int] = []
        for index, (head, own) in enumerate(zip(heads, whole, strict=True)):
            if is_text[index] and index:
                longest = max((cell_len(word) for cell in columns[index] for word in cell.split()), default=0)
                own = max(longest, min(own, prose if own == widest else prose // 2))
            least.append(max(own, *(cell_len(piece.rstrip()) for piece in _PIECES.split(head))))
        return cls(table, tuple(range(len(heads))), heads, columns, is_text, whole, tuple(least), width, rule)

    def fitted(self) -> Laid | None:
        """The columns beside each other, if they fit."""
        natural = [max(cell_len(head), cells) for head, cells in zip(self.heads, self.whole, strict=True)]
        if sum(natural) + _GAP * (len(natural) - 1) + 2 <= self.width:
            return self._drawn(natural, _GAP)
        return self._beside()

    def _beside(self) -> Laid | None:
        """The columns beside each other with headings and texts wrapped, if they fit so."""
        return self._drawn(widths, _NARROW_GAP) if (widths := self._widths()) else None

    def without_repetition(self) -> tuple[_Grid, list[str]]:
        """The table without texts that are the same in every row, and what is to be said of them."""
        same = [
            index
            for index, cells in enumerate(self.columns)
            if index and self.is_text[index] and len(cells) > 1 and len(set(cells)) == 1
        ]
        rest = [each for each in range(len(self.heads)) if each not in same]
        notes = [f"`{self.heads[at]}` is `{self.columns[at][0]}` in every row" for at in same]
        return self._only(rest), notes

    def leaner(self) -> list[_Grid]:
        """The table, and then each time without one more column that it can do without, the last one first."""
        optional = [at for at, index in enumerate(self.chosen) if self.table.columns[index].optional][::-1]
        return [
            self._only([each for each in range(len(self.heads)) if each not in optional[:count]])
            for count in range(len(optional) + 1)
        ]

    def otherwise(self) -> Laid:
        """The table in another way than with its columns beside each other."""
        turned = self._turned()
        if turned and (laid := turned.fitted()):
            return laid
        if self.table.alike or 2 * self.is_text.count(False) > len(self.heads):
            ways = [each._in_parts() for each in (self, turned) if each]
            return min(ways, key=lambda each: len(each.lines))
        room = self.width - 1 - sum(self.least[1:]) - _NARROW_GAP * (len(self.least) - 1)
        if room >= max(LEAST, self.whole[0] // 2):
            laid = self._cut_to(room).fitted()
            return replace(laid, notes=(_CUT,)) if laid else self._as_records()
        return self._as_records()

    def _only(self, at: Sequence[int]) -> _Grid:
        """Some of the columns."""

        def some(values: Sequence[T]) -> tuple[T, ...]:
            return tuple(values[each] for each in at)

        return replace(
            self, chosen=some(self.chosen), heads=some(self.heads), columns=some(self.columns), is_text=some(self.is_text),
            whole=some(self.whole), least=some(self.least),
        )  # fmt: skip

    def _cut_to(self, width: int) -> _Grid:
        """The table with shorter names in its first column."""
        names = _shortened(self.columns[0], width)
        wide = max(map(cell_len, names), default=0)
        head = max(cell_len(piece.rstrip()) for piece in _PIECES.split(self.heads[0]))
        return replace(
            self, columns=(names, *self.columns[1:]), whole=(wide, *self.whole[1:]),
            least=(max(wide, head), *self.least[1:]),
        )  # fmt: skip

    def _turned(self) -> _Grid | None:
        """Rows and columns swapped, where most columns are numbers."""
        columns = tuple(self.table.columns[each] for each in self.chosen)
        numbers = [each for each in columns if each.unit not in ("text", "mixed")]
        if len(numbers) < 3 or 2 * len(numbers) <= len(columns) or not self.table.rows:
            return None
        rows = tuple(tuple(row[each] for each in self.chosen) for row in self.table.rows)
        return _Grid.of(replace(self.table, columns=columns, rows=rows).transposed(), self.width, self.rule)

    def _widths(self) -> list[int] | None:
        """The widths of the columns with headings and texts wrapped between words; None if they do not fit."""
        found = [*self.least]
        spare = self.width - 1 - sum(found) - _NARROW_GAP * (len(found) - 1)
        if spare < 0:
            return None
        # a wrapped text costs a line in every row, so texts get the room first
        while spare and (short := [at for at, size in enumerate(found) if size < self.whole[at]]):
            found[min(short, key=lambda at: found[at] / self.whole[at])] += 1
            spare -= 1
        heads = [max(cell_len(head), size) for head, size in zip(self.heads, found, strict=True)]
        return heads if sum(heads) - sum(found) <= spare else found

    def _in_parts(self) -> Laid:
        """Some columns at a time, below each other, each time after the first column."""
        half = (self.width - 1 - _NARROW_GAP) // 2
        cut = self.whole[0] > half
        grid = self._cut_to(half) if cut else self
        parts = grid._split(len(grid.heads))
        for most in range(1, len(grid.heads)):  # as few parts, with about as many columns each
            if len(even := grid._split(most)) == len(parts):
                parts = even
                break
        laid = _below(
            [grid._only([0, *part])._beside() or grid._only([0, *part])._as_records() for part in parts]
        )
        return replace(laid, notes=(_CUT, *laid.notes)) if cut else laid

    def _split(self, most: int) -> list[list[int]]:
        """The columns after the first in parts of at most so many, as many as fit beside the first."""
        parts: list[list[int]] = []
        room = 0
        for index in range(1, len(self.heads)):
            needed = _NARROW_GAP + self.least[index]
            if not parts or needed > room or len(parts[-1]) == most:
                parts.append([])
                room = self.width - 1 - self.least[0]
            parts[-1].append(index)
            room -= needed
        return parts

    def _as_records(self) -> Laid:
        """The first cell of each row on a line of its own, and below it the others."""
        lines = self._title()
        headings = [*range(len(lines))]
        cut = False
        for first, *others in zip(*self.columns, strict=True):
            cut |= any(cell_len(word) > self.width - 3 for cell in (first, *others) for word in cell.split())
            headings.append(len(lines))
            lines += [f" {each}" for each in _wrapped(first, self.width - 1)]
            for head, cell in zip(self.heads[1:], others, strict=True):
                named = cell if len(others) == 1 else f"{head}: {cell}"
                lines += [f"   {each}" for each in _wrapped(named, self.width - 3)]
        return Laid(tuple(lines), _whole(lines, headings), (_CUT,) if cut else ())

    def _drawn(self, widths: Sequence[int], gap: int) -> Laid:
        """The table with columns of these widths."""
        heads = [_wrapped(head, size, _PIECES) for head, size in zip(self.heads, widths, strict=True)]
        high = max(map(len, heads), default=0)
        lines = self._title()
        if any(self.heads):
            lines += self._lines([[*[""] * (high - len(each)), *each] for each in heads], widths, gap)
        bold = [*_whole(lines, range(len(lines)))]
        rule = " " + self.rule * (sum(widths) + gap * (len(widths) - 1))
        lines.append(rule)
        for number, row in enumerate(zip(*self.columns, strict=True)):
            lines += [rule] if number in self.table.rules else []
            for at, cell in enumerate(row):
                if (number, self.chosen[at]) in self.table.best:
                    stop = 1 + sum(len_of for len_of in widths[: at + 1]) + gap * at
                    bold.append((len(lines), stop - len(cell), stop))
            cells = [_wrapped(cell, size) for cell, size in zip(row, widths, strict=True)]
            lines += self._lines(cells, widths, gap)
        return Laid(tuple(lines), tuple(bold))

    def _title(self) -> list[str]:
        title = visible(self.table.title)
        return [f" {each}" for each in _wrapped(title, self.width - 1)] if title else []

    def _lines(self, cells: Sequence[Sequence[str]], widths: Sequence[int], gap: int) -> Iterator[str]:
        """The lines of one row, whose cells may have several."""
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [
                set_cell_size(part, size) if is_text else " " * (size - cell_len(part)) + part
                for part, size, is_text in zip(parts, widths, self.is_text, strict=True)
            ]
            yield f" {(' ' * gap).join(padded)}".rstrip()


_CUT = "long names are shown without their middle, and whole on a wider terminal or in a pipe"


def _below(parts: Sequence[Laid], after: str | None = None) -> Laid:
    """The parts below each other, with an empty line between them."""
    lines: list[str] = []
    bold: list[tuple[int, int, int]] = []
    for part in parts:
        lines += [""] * bool(lines and lines[-1])
        bold += [(len(lines) + line, start, stop) for line, start, stop in part.bold]
        lines += part.lines
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Laid((*lines, after) if after is not None else tuple(lines), tuple(bold), tuple(notes))


def _whole(lines: Sequence[str], chosen: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
    """Some of the lines, each from its first word to its last."""
    return tuple((each, len(lines[each]) - len(lines[each].lstrip()), len(lines[each])) for each in chosen)


def prose(text: str, width: int) -> str:
    """The text with its long lines wrapped between words, each together with what follows it in the same paragraph; further
    lines are indented as the first, or after a word and its gap."""
    found: list[str] = []
    left = text.split("\n")
    while left:
        line = left.pop(0)
        start = re.match(r" *(?:[\w.]* {2,})?", line)
        indent = start[0] if start else ""
        while cell_len(line) > width and left and re.fullmatch(r"\S+(?: \S+)*", left[0]) and not indent:
            line += f" {left.pop(0)}"
        first, *others = _wrapped(line[len(indent) :], max(width - len(indent), LEAST))
        found += [(indent + first).rstrip(), *(" " * len(indent) + each for each in others)]
    return "\n".join(found)


def _wrapped(text: str, width: int, breaks: re.Pattern[str] = _WORDS) -> list[str]:
    """Lines of the text that are at most so wide; a longer word loses its middle."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for piece in breaks.split(text):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [_cut(line.rstrip(), width) for line in lines]


def _cut(text: str, width: int) -> str:
    """The text, without its middle if it is wider than that."""
    if cell_len(text) <= width:
        return text
    end = (width - 1) // 2
    last = text[-end:] if end else ""
    while cell_len(last) > end:
        last = last[1:]
    return set_cell_size(text, width - 1 - cell_len(last)) + "…" + last


def _shortened(names: Sequence[str], width: int) -> list[str]:
    """The names, long ones without their middle, and numbered where that makes two different ones equal."""
    found = [_cut(name, width) for name in names]
    if len(set(found)) < len(set(names)):
        found = [
            f"{number} {_cut(name, width - len(str(number)) - 1)}" for number, name in enumerate(names, 1)
        ]
    return found
