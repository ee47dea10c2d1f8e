from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.results.cells import Estimate
from mergecli.results.report import accuracy_table, report
from mergecli.results.result import Evaluation, TaskScore, write_predictions
from mergecli.results.statistics import wilson
from mergecli.results.tables import Table
from mergecli.runtime.errors import InputError, UsageError


def result(name: str, method: str | None = None, images: int = 1000, **accuracies: float) -> Evaluation:
    """A result of so many images a task."""
    scores = {
        task: TaskScore(
            round(accuracy * images) / images, 2 - accuracy, 2 - accuracy, round(accuracy * images), images, "test",
            {"source": "x", "fingerprint": "y"}, "c", "t",
        )
        for task, accuracy in accuracies.items()
    }  # fmt: skip
    about = {"name": name, "path": name, "digest": "d", "kind": "checkpoint", "method": method}
    return Evaluation(about, {"path": "p", "digest": "d"}, 7, scores, 128, "float32")


def names(table: Table) -> list[str]:
    return [column.name for column in table.columns]


def column(table: Table, name: str) -> list[object]:
    place = names(table).index(name)
    return [row[place] for row in table.rows]


def predictions(file: Path, **models: dict[str, list[int]]) -> Path:
    """Whether each image was classified rightly, as a file of predictions in which every label is 1."""
    rows: dict[str, list[object]] = {
        key: [] for key in ("checkpoint", "task", "index", "label", "prediction", "probability")
    }
    for model, tasks in models.items():
        for task, right in tasks.items():
            for index, each in enumerate(right):
                values = (model, task, index, 1, each, 0.5)
                for key, value in zip(rows, values, strict=True):
                    rows[key].append(value)
    write_predictions(file, rows)
    return file


TWO = [result("one", "ties", mnist=0.75, dtd=0.5), result("two", None, mnist=0.9)]
THREE = [
    result("b", "ties", mnist=0.6, dtd=0.5),
    result("a", "average", mnist=0.7, dtd=0.2),
    result("fine-tuned", "fine-tuned", mnist=0.8, dtd=1.0),
]


def test_results_stand_side_by_side_with_a_dash_where_a_task_is_missing() -> None:
    table = accuracy_table(TWO)
    assert names(table) == ["model", "method", "mnist", "dtd", "average"]
    assert table.rows == (("one", "ties", 0.75, 0.5, 0.625), ("two", None, 0.9, None, 0.9))
    assert table.warnings == ("`two` lacks `dtd`: its average is of other tasks than the others'",)


def test_one_result_needs_no_list(tmp_path: Path) -> None:
    one = result("a", digits=0.5)
    (tmp_path / "a.json").write_text(one.to_json())
    assert report(one).rows == report([one]).rows == report(str(tmp_path / "a.json")).rows


def test_people_get_percent_and_programs_fractions() -> None:
    table = accuracy_table(TWO)
    assert table.text("tsv").splitlines() == [
        "model\tmethod\tmnist\tdtd\taverage", "one\tties\t0.75\t0.5\t0.625", "two\t\t0.9\t\t0.9",
    ]  # fmt: skip
    assert json.loads(table.text("json"))[1] == {
        "model": "two", "method": None, "mnist": 0.9, "dtd": None, "average": 0.9,
    }  # fmt: skip
    assert table.text("md").splitlines()[:4] == [
        "| model | method | mnist | dtd | average |", "| :-- | :-- | --: | --: | --: |",
        "| one | ties | 75.0 | 50.0 | 62.5 |", "| two | - | **90.0** | - | **90.0** |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sort", "ascending", "order"),
    [
        (None, False, ["b", "a", "fine-tuned"]),
        ("average", False, ["fine-tuned", "b", "a"]),
        ("average", True, ["a", "b", "fine-tuned"]),
        ("mnist", False, ["fine-tuned", "a", "b"]),
        ("name", False, ["a", "b", "fine-tuned"]),
    ],
)
def test_rows_come_as_given_or_sorted(sort: str | None, ascending: bool, order: list[str]) -> None:
    assert column(report(THREE, sort=sort, ascending=ascending), "model") == order


def test_a_row_without_the_number_it_is_sorted_by_comes_last() -> None:
    for ascending in (False, True):
        table = report([TWO[1], *TWO[:1], THREE[0]], sort="dtd", ascending=ascending)
        assert column(table, "model")[-1] == "two"


def test_a_row_with_learned_heads_is_said_to_have_them() -> None:
    own = replace(THREE[0], checkpoint={**THREE[0].checkpoint, "routing": "task", "heads": "learned"})
    table = accuracy_table([own, THREE[1]])
    assert "`b` has learned heads; those of the other rows are zero-shot heads." in table.notes
    assert not any("learned heads" in each for each in accuracy_table(THREE).notes)


def test_a_row_made_of_quantized_task_vectors_says_so_below_the_table() -> None:
    of = "2 task vectors of 4 bits (errors 9.69% to 10.36%)"
    checkpoint = {**THREE[1].checkpoint, "quantized": of}
    table = accuracy_table([THREE[0], replace(THREE[1], checkpoint=checkpoint)])
    assert f"`{THREE[1].name}`: made of {of}." in table.notes


def test_losses_are_losses() -> None:
    table = report(THREE, metric="loss", sort="average", ascending=True)
    assert column(table, "mnist") == [1.2, 1.4, 1.3]
    assert table.text("md").splitlines()[2] == "| fine-tuned | fine-tuned | 1.2000 | 1.0000 | 1.1000 |"


def test_normalized_accuracies_are_relative_to_the_fine_tuned_models() -> None:
    table = report(THREE, normalized=True)
    assert names(table)[-3:] == ["mnist (norm.)", "dtd (norm.)", "average (norm.)"]
    assert table.rows[0][-3:] == pytest.approx((0.75, 0.5, 0.625))
    assert table.rows[2][-3:] == (1.0, 1.0, 1.0)
    assert "`fine-tuned`" in table.notes[0]


def test_the_fine_tuned_models_may_stand_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(result("own", mnist=0.8).to_json())
    table = report(THREE[:1], normalized=True, fine_tuned=tmp_path / "own.json")
    assert table.rows[0][-3:] == (0.6 / 0.8, None, None)
    assert "`own` lacks `dtd`: not normalized" in table.warnings


def test_seen_and_unseen_tasks_have_averages_of_their_own() -> None:
    three = result("m", mnist=0.5, dtd=0.7, svhn=0.3)
    table = report([three], seen="svhn,MNIST")
    assert names(table)[-3:] == ["average", "average (seen)", "average (unseen)"]
    assert table.rows[0][-3:] == pytest.approx((0.5, 0.4, 0.7))
    assert table.notes == ("seen: svhn, mnist.",)
    whole = report([three], seen=["svhn", "mnist", "dtd"])
    assert whole.rows[0][-2:] == (pytest.approx(0.5), None)


def test_intervals_are_wilsons_and_said_to_be() -> None:
    table = report(TWO, intervals=True)
    assert column(table, "mnist")[0] == Estimate(0.75, *wilson(750, 1000))
    low, high = wilson(750, 1000)
    average = column(table, "average")[0]
    assert isinstance(average, Estimate)
    assert high - low > average.high - average.low > (high - low) / 2
    assert "Wilson" in table.notes[0]
    average = column(table, "average")[1]
    assert isinstance(average, Estimate)
    assert average[:3] == pytest.approx((0.9, *wilson(900, 1000)))


@pytest.mark.parametrize("form", ["tsv", "csv", "json", "md", "latex", "html"])
@pytest.mark.parametrize("transpose", [False, True])
def test_every_option_is_in_every_format(form: str, transpose: bool) -> None:
    tasks = dict.fromkeys(("mnist", "dtd"), 0.5)
    table = report(
        [result("m", "ties", **tasks), result("fine-tuned", "fine-tuned", mnist=0.8, dtd=0.9)], normalized=True,
        seen="dtd", intervals=True, against="m", reference="clip-vit-base-patch32-ta8", reference_rows=True,
        sort="average", transpose=transpose,
    )  # fmt: skip
    text = table.text(form)
    for part in (
        "mnist (norm.)",
        "average (seen)",
        "average (diff.)",
        "difference",
        "RegMean++",
        "published",
    ):
        assert part in text
    if form in ("md", "latex", "html"):
        assert "±" in text or r"$\pm$" in text
        assert "unpaired" in text


def best(table: Table) -> list[tuple[object, str]]:
    """(model, column) of each bold number."""
    return sorted((table.rows[row][0], names(table)[place]) for row, place in table.best)


def test_the_best_merge_is_bold_and_nothing_that_is_no_merge() -> None:
    merge = replace(result("a", "average", mnist=0.7, dtd=0.2), models={"mnist": "hf:org/mnist"})
    expert = result("expert", mnist=0.95, dtd=0.1)
    expert = replace(expert, checkpoint={**expert.checkpoint, "path": "hf:org/mnist"})
    base, trained = result("base", "pretrained", mnist=0.9), result("t", "finetune --lora", mnist=0.9)
    every = [merge, expert, base, trained, *THREE[::2]]
    table = report(every, normalized=True, reference="clip-vit-base-patch32-ta8", reference_rows=True)
    assert table.kinds[:7] == ("merge", "model", "base", "model", "merge", "ceiling", "published")
    assert table.rules == {5, 6}
    assert best(table) == [
        ("a", "mnist"), ("a", "mnist (norm.)"), ("b", "average"), ("b", "average (norm.)"), ("b", "dtd"), ("b", "dtd (norm.)"),
    ]  # fmt: skip


def test_the_best_loss_is_the_least() -> None:
    assert best(report(THREE, metric="loss")) == [("a", "mnist"), ("b", "average"), ("b", "dtd")]


def test_equal_numbers_are_bold_together_and_one_merge_alone_is_not() -> None:
    assert best(report([result("a", "ties", mnist=0.5), result("b", "ties", mnist=0.5)])) == [
        ("a", "average"), ("a", "mnist"), ("b", "average"), ("b", "mnist"),
    ]  # fmt: skip
    assert best(report([THREE[0], result("base", "pretrained", mnist=0.9), THREE[2]])) == []


def test_of_models_without_a_merge_the_best_model_is_bold() -> None:
    models = [result(each, "finetune", mnist=0.5 + 0.1 * rank) for rank, each in enumerate("ab")]
    assert best(report([*models, THREE[2]])) == [("b", "average"), ("b", "mnist")]


def test_a_difference_from_counts_is_said_to_be_unpaired() -> None:
    table = report([*THREE[:2], result("c", mnist=0.601, dtd=0.5)], against="b")
    assert names(table)[-3:] == ["mnist (diff.)", "dtd (diff.)", "average (diff.)"]
    assert table.rows[0][-3:] == (None, None, None)
    better, worse, average = table.rows[1][-3:]
    assert isinstance(better, Estimate)
    assert isinstance(worse, Estimate)
    assert isinstance(average, Estimate)
    assert (better.value, better.significant) == (pytest.approx(0.1), True)
    assert (worse.value, worse.significant) == (pytest.approx(-0.3), True)
    assert average.low < -0.1 < average.high < 0
    assert [cell.significant for cell in table.rows[2][-3:] if isinstance(cell, Estimate)] == [False] * 3
    assert [note.partition(":")[0] for note in table.notes] == ["(diff.)", "±"]
    assert "unpaired" in table.notes[1]


def test_predictions_make_small_differences_count(tmp_path: Path) -> None:
    """Ten images that only one model had right, and none that only the other had: chance does that once in 512 times."""
    first, second = [1] * 500 + [0] * 500, [1] * 510 + [0] * 490
    file = predictions(tmp_path / "p.parquet", b={"mnist": first}, a={"mnist": second})
    both = [result("b", mnist=0.5), result("a", mnist=0.51)]
    unpaired, paired = (report(both, against="b", predictions=each).rows[1][-2] for each in ([], [file]))
    assert isinstance(unpaired, Estimate)
    assert isinstance(paired, Estimate)
    assert (unpaired.value, unpaired.significant) == (paired.value, False)
    assert paired.significant is True
    assert 0 < paired.low < 0.01 < paired.high
    notes = report(both, against="b", predictions=[file]).notes
    assert "McNemar" in notes[0]
    assert "paired bootstrap" in notes[1]


def test_five_images_that_only_one_model_had_right_are_chance(tmp_path: Path) -> None:
    file = predictions(
        tmp_path / "p.parquet", b={"mnist": [1] * 500 + [0] * 500}, a={"mnist": [1] * 505 + [0] * 495}
    )
    cell = report([result("b", mnist=0.5), result("a", mnist=0.505)], against="b", predictions=[file]).rows[
        1
    ][-2]
    assert isinstance(cell, Estimate)
    assert cell.significant is False


def test_the_predictions_of_the_fine_tuned_models_have_the_names_of_their_tasks(tmp_path: Path) -> None:
    one = predictions(tmp_path / "1.parquet", mnist={"mnist": [1] * 9 + [0]})
    two = predictions(tmp_path / "2.parquet", m={"mnist": [1] * 5 + [0] * 5})
    both = [result("fine-tuned", "fine-tuned", 10, mnist=0.9), result("m", None, 10, mnist=0.5)]
    cell = report(both, against="fine-tuned", predictions=[one, two]).rows[1][-2]
    assert isinstance(cell, Estimate)
    assert cell.value == pytest.approx(-0.4)


def test_the_model_to_compare_with_may_stand_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(result("other", mnist=0.1, dtd=0.1).to_json())
    table = report(THREE[:1], against=str(tmp_path / "other.json"))
    cell = table.rows[0][-1]
    assert isinstance(cell, Estimate)
    assert cell.value == pytest.approx(0.45)


def test_wrong_predictions_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    both = [result("b", None, 4, mnist=0.5), result("a", None, 4, mnist=0.75)]

    def refused(message: str, *files: Path) -> None:
        with pytest.raises(InputError, match=message):
            report(both, against="b", predictions=files)

    right = {"mnist": [1, 1, 0, 0]}
    refused("no.parquet: no such predictions", tmp_path / "no.parquet")
    (tmp_path / "x.parquet").write_text("x")
    refused("x.parquet: is not a table of predictions", tmp_path / "x.parquet")
    file = predictions(tmp_path / "b.parquet", b=right)
    refused("there are none of `a` on `mnist`\nhint: the files have `b`", file)
    refused(
        "b2.parquet: `b` on `mnist` is in another file too",
        file,
        predictions(tmp_path / "b2.parquet", b=right),
    )
    refused(
        "there are none of `a` on `mnist`",
        predictions(tmp_path / "task.parquet", b=right, a={"dtd": [1, 1, 1, 0]}),
    )
    refused(
        "`a` on `mnist`: 3 of 5 images are right, but the result says 3 of 4",
        predictions(tmp_path / "more.parquet", b=right, a={"mnist": [1, 1, 1, 0, 0]}),
    )
    refused(
        "`a` on `mnist`: 2 of 4 images are right, but the result says 3 of 4",
        predictions(tmp_path / "fewer.parquet", b=right, a=right),
    )
    columns = {"checkpoint": ["a"] * 2, "task": ["mnist"] * 2, "index": [0, 0], "label": [1, 1]}
    write_predictions(tmp_path / "lacks.parquet", columns)
    refused("lacks.parquet: is not a table of predictions", tmp_path / "lacks.parquet")
    write_predictions(tmp_path / "twice.parquet", {**columns, "prediction": [1, 1]})
    refused("`a` on `mnist`: an image is there twice", tmp_path / "twice.parquet")
    write_predictions(tmp_path / "words.parquet", {**columns, "prediction": ["x", "y"]})
    refused("words.parquet: is not a table of predictions", tmp_path / "words.parquet")


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    rows = {"checkpoint": ["b"] * 2 + ["a"] * 2, "task": ["mnist"] * 4, "index": [0, 1, 0, 2]}
    write_predictions(tmp_path / "p.parquet", {**rows, "label": [1] * 4, "prediction": [1, 0, 1, 1]})
    both = [result("b", None, 2, mnist=0.5), result("a", None, 2, mnist=1.0)]
    with pytest.raises(InputError, match="`a` and `b` were not evaluated on the same images of `mnist`"):
        report(both, against="b", predictions=[tmp_path / "p.parquet"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sort": "mnits"}, r"--sort: expected one of average, name, mnist, dtd, got `mnits` \(did you mean `mnist`"),
        ({"ascending": True}, "--ascending: needs `--sort`"),
        ({"metric": "los"}, r"--metric: expected one of accuracy, loss, got `los` \(did you mean `loss`"),
        ({"metric": "loss", "intervals": True}, "--intervals: is about accuracies"),
        ({"seen": "mnist,cars"}, "--seen: no result has a task `cars`"),
        ({"normalized": True}, "--normalized: no results are called `fine-tuned`"),
        ({"fine_tuned": "x.json"}, "--fine-tuned: is for `--normalized`"),
        ({"against": "tow"}, r"--against: no result is called `tow` \(did you mean `two`"),
        ({"predictions": ["p.parquet"]}, "--predictions: compare with which model"),
        ({"p_values": True, "against": "one"}, "--p-values: a test needs the predictions of both models"),
        ({"reference_rows": True}, "--reference-rows: of which table"),
        ({"plot_kind": "bars"}, "--plot-kind: there is no picture to draw"),
        ({"plot": "r.png", "plot_kind": "bar"}, r"--plot-kind: expected one of .*, got `bar` \(did you mean `bars`"),
        ({"plot": "r.gif"}, "r.gif: expected a .png, .svg or .pdf file"),
        ({"plot": "r.svg", "output": "r.svg", "format": "md"}, "r.svg: two outputs have this name"),
        ({"output": "r.xls"}, r"r.xls: expected a .md, .tex, .json, .csv, .tsv or .html file"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    arguments: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        report(TWO, **arguments)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_two_results_of_one_name_cannot_be_compared_with() -> None:
    with pytest.raises(UsageError, match="2 results are called `one`"):
        report([TWO[0], TWO[0]], against="one")


def test_nothing_to_report_and_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no results to report"):
        report([])
    (tmp_path / "x.json").write_text('{"schema": "mergecli.eval/9"}')
    with pytest.raises(InputError, match=r"x.json: is not a result: `schema`: expected `mergecli.eval/1`"):
        report([tmp_path / "x.json"])


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".md", "| model"), (".csv", "model,"), (".tex", "\\begin"), (".tsv", "model\t"), (".html", "<!DOCTYPE html>")],
)  # fmt: skip
def test_the_suffix_of_the_output_chooses_the_format(tmp_path: Path, suffix: str, start: str) -> None:
    report(TWO, output=tmp_path / f"r{suffix}")
    assert (tmp_path / f"r{suffix}").read_text().startswith(start)


def test_a_report_of_files_is_the_report_of_their_results(tmp_path: Path) -> None:
    files = [tmp_path / f"{each.name}.json" for each in TWO]
    for file, each in zip(files, TWO, strict=True):
        file.write_text(each.to_json())
    assert report(files) == accuracy_table(TWO)
    before = files[0].read_bytes()
    for option in ({"output": files[0]}, {"against": files[1], "output": files[1]}):
        with pytest.raises(UsageError, match="the output would replace an input"):
            report(files, **option)
    assert files[0].read_bytes() == before
