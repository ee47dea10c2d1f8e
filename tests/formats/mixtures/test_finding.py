"""Files that find the task of an image by themselves, as commands see them."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergecli
from mergecli.results.result import read_result
from mergecli.runtime.errors import UsageError
from tests.support.mixture_scores import TASKS


@pytest.fixture(scope="module")
def file(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGECLI_HOME", str(folder / "home"))
        mergecli.merge(
            place / "r.toml", method="tsv_c", settings={"router": "sim"}, output=folder / "found.safetensors"
        )
    return folder / "found.safetensors"


def test_results_say_how_often_the_right_task_was_found(place: Path, file: Path, tmp_path: Path) -> None:
    towers = {"found": file, "told": place / "tsv_c.safetensors"}
    mergecli.evaluate(
        towers, recipe=place / "r.toml", output=tmp_path / "out", routes=tmp_path / "routes", batch_size=5
    )
    found, told = (read_result(tmp_path / "out" / f"{name}.json") for name in towers)
    assert (found.checkpoint["routing"], told.checkpoint["routing"]) == ("sim", "task")
    assert {score.task_found for score in told.tasks.values()} == {None}
    rows = (tmp_path / "routes" / "found.csv").read_text().splitlines()
    assert rows[0] == "task,layer,one,two,three"
    shares = {row.split(",")[0]: [float(each) for each in row.split(",")[2:]] for row in rows[1:]}
    for number, task in enumerate(TASKS):
        assert found.tasks[task].task_found == pytest.approx(shares[task][number])
    table = mergecli.report([found, told])
    assert [column.name for column in table.columns[:5]] == [
        "model",
        "method",
        "size",
        "routing",
        "task found",
    ]
    mean = sum(score.task_found or 0 for score in found.tasks.values()) / 3
    assert [row[4] for row in table.rows] == [pytest.approx(mean), None]
    assert (
        "routing: `task`, the task is given; "
        "`sim`, the file finds the task of each image, and its class among those of the true task."
    ) in table.notes
    assert (
        "task found: images for which the file found the right task, averaged over the tasks." in table.notes
    )


def test_a_task_that_the_file_does_not_know_is_counted_and_never_found(
    place: Path, file: Path, tmp_path: Path
) -> None:
    recipe = (
        place / "r.toml"
    ).read_text() + f'[tasks.four]\ndata = "{place}/images/one"\ntemplates = ["a {{}}"]\n'
    (tmp_path / "r.toml").write_text(
        recipe.replace('"clip"', f'"{place}/clip"').replace('= "images', f'= "{place}/images')
        .replace('.safetensors"\n', '.safetensors"\n').replace('= "one.', f'= "{place}/one.')
        .replace('= "two.', f'= "{place}/two.').replace('= "three.', f'= "{place}/three.')
    )  # fmt: skip
    (result,) = mergecli.evaluate(file, recipe=tmp_path / "r.toml", tasks=["four"], limit=3)
    assert result.tasks["four"].images == 3
    assert result.tasks["four"].task_found is None


def test_one_tasks_tower_is_a_plain_model(place: Path, file: Path) -> None:
    results = mergecli.evaluate(
        {"a": f"{file}#two", "b": f"{place / 'tsv_c.safetensors'}#two"},
        recipe=place / "r.toml",
        tasks=["two"],
    )
    one, other = (each.tasks["two"] for each in results)
    assert (one.loss, one.task_found) == (other.loss, None)


def test_features_of_many_towers_are_refused(place: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        mergecli.evaluate({"m": file}, recipe=place / "r.toml", features=tmp_path / "f")
    assert raised.value.message == (
        "--features: `m`: each image goes through the tower of the task that is found for it"
    )
    assert raised.value.hint == "name the tower of one task: `FILE#TASK`"
