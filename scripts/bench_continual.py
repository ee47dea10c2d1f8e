"""Times the steps of a chain on checkpoints with the shapes of CLIP vision towers: each step is a process of its own.

    python scripts/bench_continual.py opcm nufilt                twenty steps of each on whole ViT-B/32
    python scripts/bench_continual.py dop --steps 3              a step of `dop` takes a quarter of an hour on two cores
    python scripts/bench_continual.py ties --set method.density=0.1

Time and memory should not grow with the step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench import SHAPES, Case, made, measured

MODELS = 4
"""Different models; a longer chain meets them again."""


def chain(method: str, changes: list[str], steps: int, place: Path) -> None:
    """Makes one chain and prints what each step took."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        previous = place / "base"
        for step in range(1, steps + 1):
            output = Path(folder) / f"{step}.safetensors"
            model = f"x{step}={place / f't{(step - 1) % MODELS}'}"
            command = [
                sys.executable,
                "-m",
                "mergecli",
                "merge",
                "--onto",
                str(previous),
                model,
                "-o",
                str(output),
            ]
            command += ["--base", str(place / "base")]
            if step == 1:
                command += ["--method", method, *(part for each in changes for part in ("--set", each))]
            found = measured(Case(method, "mergecli", command))
            if found.failed:
                raise SystemExit(f"{method}: step {step} {found.failed}")
            cells = f"{found.cpu_seconds:.1f}\t{found.seconds:.1f}\t{1000 * found.max_rss_gb:.0f}"
            print(f"{method}\t{step}\t{cells}", flush=True)
            for old in Path(folder).iterdir():
                if not old.name.startswith(f"{step}."):
                    old.unlink()
            previous = output


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kind", choices=SHAPES, default="ViT-B/32")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the method")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/bench"), help="where the models are, or are made"
    )
    arguments = parser.parse_args()
    place = made(arguments.folder, arguments.kind, MODELS)
    print("method\tstep\tprocessor s\twall s\tmax RSS MB")
    for method in arguments.methods:
        chain(method, arguments.set, arguments.steps, place)


if __name__ == "__main__":
    main()
