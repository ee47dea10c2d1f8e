"""Inputs that people of other tools stumbled over: each is counted right, or refused with one clear error."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import Run

CASES = Path(os.environ.get("MERGECLI_TEST_CASES", Path(__file__).parents[3] / "shared" / "cases"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")


@pytest.mark.parametrize(
    ("case", "correct", "images", "loss", "line"),
    [
        ("order_permuted", 4, 9, None, "used 9 images in 3 classes (by name)"),
        ("folders_of_numbers", 1, 12, None, "used 12 images in 12 classes (by number)"),
        ("jupyter_leftover", 3, 8, None, "used 8 images in 2 classes (the data's own names)"),
        ("suffix_not_listed", 3, 8, None, "used 8 images in 2 classes (the data's own names)"),
        ("metadata_csv", 3, 4, None, "used 4 images in 2 classes (the data's own names)"),
        ("food101_names", 0, 4, 7.8381, "used 4 images in 4 of 101 classes (by name)"),
        ("gray_16_bit", 3, 8, 3.2199, "used 8 images in 4 classes (labels are numbers)"),
        ("odd_exif", 4, 8, 2.8689, "used 8 images in 2 classes (labels are numbers)"),
    ],
)
def test_it_is_counted_right_and_one_line_says_what_was_counted(
    run: Run, case: str, correct: int, images: int, loss: float | None, line: str
) -> None:
    task = "food101" if case == "food101_names" else "birds"
    recipe = CASES / case / "recipe.toml"
    ended = run("eval", "--recipe", recipe, "--model", task, "-o", "out.json", "--no-cache")
    assert (ended.status, ended.rest) == (0, "")
    assert re.fullmatch(rf"note: .*: split `\w+`: {re.escape(line)}\n", ended.err)
    score = json.loads(Path("out.json").read_text())["tasks"][task]
    assert (score["correct"], score["images"]) == (correct, images)
    if loss is not None:
        assert score["loss"] == pytest.approx(loss, abs=5e-4)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing_shard", "has 2 of 3 shards; `-00001-of-00003` is missing\n"),
        (
            "shards_with_other_names",
            "test-00000-of-00002.parquet and test-00001-of-00002.parquet differ in the class names of column `label`: "
            "`robin`, `wren` and `wren`, `robin`\n",
        ),
        (
            "channels_first",
            "column `image`, row 0: the pixels are lists of 3 x 24 x 24, which has the channels first\n",
        ),
    ],
)
def test_it_is_refused(run: Run, case: str, message: str) -> None:
    ended = run(
        "eval", "--recipe", CASES / case / "recipe.toml", "--model", "birds", "-o", "out.json", "--no-cache"
    )
    assert (ended.status, ended.out) == (3, "")
    assert re.fullmatch(
        rf"error: {re.escape(str(CASES / case))}/data \(task `birds`\): split `test`: {re.escape(message)}hint: .*\n",
        ended.rest,
    )
    assert not Path("out.json").exists()


def test_published_names_score_the_images_as_the_published_model_was_trained(
    run: Run, tmp_path: Path
) -> None:
    scores: list[dict[str, object]] = []
    for names in ("", 'names = "published"\n'):
        text = (CASES / "food101_names" / "recipe.toml").read_text().replace("../", f"{CASES}/")
        text = text.replace('data = "data"', f'data = "{CASES}/food101_names/data"\n{names}')
        (tmp_path / "r.toml").write_text(text)
        assert (
            run("eval", "--recipe", "r.toml", "--model", "food101", "-o", "out.json", "--no-cache").status
            == 0
        )
        scores.append(json.loads(Path("out.json").read_text())["tasks"]["food101"])
    assert scores[0]["loss"] != scores[1]["loss"]
    assert scores[0]["classes"] != scores[1]["classes"]
    assert scores[1]["classes"] == "9c0eeb5a368baacb"  # of the published list, in its order
