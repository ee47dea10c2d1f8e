"""The documentation: pages that come from the code are there and whole, and pages by hand name what exists."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mergecli
from mergecli import methods
from mergecli.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HANDWRITTEN = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("docs_hook")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def pages(hook: ModuleType) -> dict[str, str]:
    return hook.pages()


def test_every_method_has_a_page_with_its_settings_and_paper(pages: dict[str, str]) -> None:
    index = pages["methods/index.md"]
    for name in methods.names():
        page = pages[f"methods/{name}.md"]
        assert f"]({name}.md)" in index
        assert all(f"`method.{setting}`" in page for setting in methods.settings(name))
        assert "## Paper" in page
        assert "## Cost" in page


def test_every_command_and_option_is_in_the_reference(pages: dict[str, str]) -> None:
    from typer.main import get_command

    program: Any = get_command(app())
    for name, command in program.commands.items():
        part = pages["cli.md"].split(f"\n## {name}\n")[1].split("\n## ")[0]
        options = [each for each in command.params if each.param_type_name == "option"]
        assert all(name in part for option in options for name in option.opts)


def test_every_public_name_is_in_the_api(pages: dict[str, str]) -> None:
    named = {line.rsplit(".", 1)[1] for line in pages["api.md"].splitlines() if line.startswith("::: ")}
    assert named == set(mergecli.__all__)


def test_every_built_in_task_is_listed(pages: dict[str, str]) -> None:
    assert all(f"| `{name}` |" in pages["tasks.md"] for name in ("sun397", "rendered-sst2", "digits"))


def test_the_formats_have_a_table_for_every_class_that_is_named(hook: ModuleType) -> None:
    text = (DOCS / "reference" / "formats.md").read_text("utf-8")
    assert "@fields" not in hook.filled(text)
    assert "`loss_batch_mean`" in hook.filled(text)
    assert "`mergecli.eval/1`" in text


def test_pages_by_hand_lead_to_pages(pages: dict[str, str]) -> None:
    for file in HANDWRITTEN:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text("utf-8")):
            path = (file.parent / target).resolve()
            assert path.exists() or str(path.relative_to(DOCS)) in pages, f"{file.name}: {target}"


def test_options_and_commands_in_the_guides_exist() -> None:
    from typer.main import get_command

    program: Any = get_command(app())
    known = {name: {option for each in command.params for option in each.opts} for name, command in program.commands.items()}  # fmt: skip
    for file in HANDWRITTEN:
        code = "\n".join(re.findall(r"^```sh\n(.*?)^```", file.read_text("utf-8"), re.MULTILINE | re.DOTALL))
        for line in re.findall(r"^(?:.*-m )?mergecli ([a-z][^\n#]*)", code, re.MULTILINE):
            name, *words = line.split("$(")[0].split()
            used = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
            assert used <= known[name], f"{file.name}: mergecli {line}"


def test_the_methods_that_the_guides_name_exist() -> None:
    for file in HANDWRITTEN:
        named = set(re.findall(r"--method (\w+)", file.read_text("utf-8"))) - {"NAME"}
        assert named <= set(methods.names()), file.name


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make slow` installs it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert (tmp_path / "site" / "index.html").is_file()
