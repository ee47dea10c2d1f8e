"""One process at a time."""

from __future__ import annotations

import subprocess
import sys

from mergecli.storage.alone import alone

COUNTS = """
import sys, time
from pathlib import Path
from mergecli.storage.alone import alone
place = Path(sys.argv[1])
for _ in range(20):
    with alone(place):
        number = int(place.read_text())
        time.sleep(0.001)
        place.write_text(str(number + 1))
"""


def test_what_processes_do_under_a_lock_they_do_one_after_another_and_the_lock_goes(tmp_path):
    place = tmp_path / "number"
    place.write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", COUNTS, str(place)]) for _ in range(3)]
    assert [each.wait() for each in running] == [0, 0, 0]
    assert place.read_text() == "60"
    assert [file.name for file in tmp_path.iterdir()] == ["number"]


def test_where_there_can_be_no_lock_nobody_waits(tmp_path):
    (tmp_path / "file").touch()
    with alone(tmp_path / "file" / "number"):
        pass
