"""The shared cases about models: a CLIP tuned in both towers, and a processor of another size than the tower's.

They lie in the folder that `MERGECLI_TEST_CASES` names; the same without them is in `tests/clip`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run

CASES = Path(os.environ.get("MERGECLI_TEST_CASES", ROOT.parent / "shared" / "cases"))

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")


def test_a_clip_tuned_in_both_towers_is_evaluated_with_the_base_s_and_that_is_said(
    tmp_path: Path, run: Run
) -> None:
    case = CASES / "both_towers_tuned"
    ended = run("eval", "--recipe", case / "recipe.toml", "--model", "birds", "-o", "out.json")
    assert ended.status == 0
    assert ended.err.splitlines()[:2] == [
        "warning: these models differ from ../base outside of the vision tower, and are evaluated with its text tower and "
        "other parts:",
        f"  `birds`: text tower, text projection, logit scale (to use them: `--clip {case / 'clip'}`)",
    ]
    score = json.loads((tmp_path / "out.json").read_text())["tasks"]["birds"]
    own = run(
        "eval",
        "--recipe",
        case / "recipe.toml",
        "--model",
        "birds",
        "--clip",
        case / "clip",
        "-o",
        "own.json",
    )
    assert own.status == 0
    assert "warning" not in own.err
    assert json.loads((tmp_path / "own.json").read_text())["tasks"]["birds"]["loss"] != score["loss"]


def test_a_processor_of_another_size_is_one_error_before_anything_starts(tmp_path: Path, run: Run) -> None:
    case = CASES / "processor_of_other_size"
    ended = run("eval", "--recipe", case / "recipe.toml", "--model", "birds", "-o", "out.json")
    assert (ended.status, ended.out) == (3, "")
    assert ended.err.splitlines()[-2:] == [
        f"error: {case / 'clip'}: its image processor gives 16 x 16 pixels, its vision tower takes 24 x 24",
        "hint: copy `preprocessor_config.json` of the model that the tower was made from; or set `size` and `crop_size` "
        "in it",
    ]
    assert not (tmp_path / "out.json").exists()
