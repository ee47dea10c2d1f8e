"""Makes the pages of the documentation that come from the code, so that they cannot differ from it. MkDocs calls it.

Methods, tasks, commands and the Python API get pages of their own, the changelog is CHANGELOG.md, and a line such as
`@fields TaskScore` in a page becomes a table of that dataclass's fields, and `@file recipes/slurm/ray.sbatch` that file. Nothing is written
outside of the site.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.main import get_command

import mergecli
from mergecli import methods
from mergecli.cli.app import app

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mergecli"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the methods into the navigation, by what they need."""
    for entry in config.nav or []:
        if "Methods" in entry:
            groups = [{title: [_method_file(name) for name in names]} for title, _, names in _groups()]
            entry["Methods"] = ["methods/index.md", *groups]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Path -> text of every page that is generated."""
    found = {"methods/index.md": _methods_index(), "tasks.md": _tasks(), "cli.md": _cli(), "api.md": _api()}
    found |= {_method_file(name): _method(name) for name in methods.names()}
    found["changelog.md"] = (ROOT / "CHANGELOG.md").read_text("utf-8")
    found["index.md"] = _start()
    found["guide/notebook.md"] = _notebook()
    return found


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces each line `@fields CLASS` by the table of its fields, and `@file PATH` by that file."""
    del page, config, files
    return filled(markdown)


def filled(markdown: str) -> str:
    """The text with a table in the place of each line `@fields CLASS` or `@fields CLASS without FIELD`, and a block in that of
    `@file PATH`."""
    markdown = re.sub(
        r"^@file (\S+)$",
        lambda found: f'```bash title="{found[1]}"\n{(ROOT / found[1]).read_text("utf-8")}```',
        markdown,
        flags=re.MULTILINE,
    )
    directive = r"^@fields (\w+)(?: without (\w+))?$"
    return re.sub(directive, lambda found: _fields(found[1], found[2]), markdown, flags=re.MULTILINE)


def _start() -> str:
    """The README, with its links turned to the site's pages."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"\(mergecli/methods/(\w+)\.py\)", r"(methods/\1.md)", text)
    text = text.replace("```console", "```sh")  # without prompts a console's lines would look like output
    text = text.replace("(docs/", "(").replace("(CHANGELOG.md)", "(changelog.md)")
    text = re.sub(r"\[([^\]]+)\]\((?:LICENSE|CITATION\.cff)\)", r"\1", text)
    return re.sub(
        r"<picture>.*?<img alt=\"([^\"]*)\".*?</picture>",
        r"![\1](images/benchmark-light.svg)\n![\1](images/benchmark-dark.svg)",
        text,
        flags=re.DOTALL,
    )


def _notebook() -> str:
    """The notebook as a page: its texts, its code, and what that prints."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text("utf-8"))
    parts: list[str] = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [f"```text\n{''.join(each['text']).rstrip()}\n```" for each in cell.get("outputs", [])]
    return "\n\n".join([*parts, "The page is [a notebook](../notebook.ipynb).\n"])


# methods


def _method_file(name: str) -> str:
    return f"methods/{name}.md"


def _groups() -> list[tuple[str, str, list[str]]]:
    """Title, what it needs, and names, of each kind of methods; every method is of one."""
    return [
        (f"{kind[0].upper()}{kind[1:]}", f"{needs[0].upper()}{needs[1:]}.",
         [name for name in methods.names() if methods.find(name).kind == kind])
        for kind, needs in methods.KINDS.items()
    ]  # fmt: skip


def _methods_index() -> str:
    parts = [
        "# Methods\n",
        "`mergecli methods` lists them, and `mergecli methods NAME` shows the page of one.\n",
    ]
    for title, about, names in _groups():
        parts.append(f"## {title}\n\n{about}\n")
        rows = [
            (f"[`{name}`]({name}.md)", _first(methods.find(name).title), _cost(name)[0]) for name in names
        ]
        parts.append(_table(("method", "what it does", "cost"), rows))
    return "\n".join(parts)


def _method(name: str) -> str:
    method = methods.find(name)
    parts = [f"# {name}\n", _first(method.title) + ".\n", _equation(inspect.getdoc(method) or "")]
    settings = methods.settings(name)
    if settings:
        rows = [
            (f"`method.{each.name}`", _prose(each.expected), "required" if each.required else f"`{_toml(each.default)}`",
             _prose(" ".join(each.documentation.split())))
            for each in settings.values()
        ]  # fmt: skip
        parts.append("## Settings\n\n" + _table(("setting", "value", "default", ""), rows))
    parts.append("## Cost\n\n" + "".join(f"- {_first(each)}.\n" for each in _cost(name)))
    if settings:
        about = methods.about_layers(method)
        parts.append(f"[By layer](../guide/recipes.md#settings-by-layer), {about}.\n")
    parts.append(f"## Paper\n\n{_prose(method.paper)}\n")
    required = [each for each in settings.values() if each.required]
    command = f"mergecli merge recipe.toml --method {name} -o merged.safetensors"
    if not required:
        parts.append(f"## Command\n\n```sh\n{command}\n```\n")
    return "\n".join(parts)


def _cost(name: str) -> list[str]:
    method = methods.find(name)
    passes = "reads every model once" if method.passes == 1 else f"reads every model {method.passes} times"
    found = [passes, method.work, method.looks_at, "needs a base" if method.needs_base else "needs no base"]
    return [each for each in found if each]


def _equation(docstring: str) -> str:
    """The paragraphs of a docstring: those that end with a full stop are prose, the others are mathematics."""
    parts: list[str] = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.rstrip().endswith((".", ".)")):
            parts.append(_prose(" ".join(paragraph.split())) + "\n")
        else:
            parts.append(f"``` {{ .text .equation }}\n{paragraph}\n```\n")
    return "\n".join(parts).replace("```\n\n``` { .text .equation }\n", "\n")  # one block where two meet


def _toml(value: object) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, methods.Method):
        table = {"name": methods.name_of(value), **methods.table_of(value)}
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in table.items()) + " }"
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# tasks


def _mergecli(*arguments: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "mergecli", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


def _tasks() -> str:
    known: list[dict[str, Any]] = json.loads(_mergecli("tasks", "--json"))
    toys = [each for each in known if each["data"].startswith("toy:")]
    parts = [
        "# Tasks\n",
        "`mergecli tasks` lists them. `mergecli tasks NAME` shows the data, the class names and the prompts of one.\n",
        "`ta8` is the first eight of the published tasks, `tall10` to `tall20` are the first ten to twenty, and `toy8` is the toys.\n",
    ]
    for title, chosen in (
        ("Published tasks", [each for each in known if each not in toys]),
        ("Toy tasks", toys),
    ):
        rows = [
            (f"`{each['task']}`", _prose(each["what it is"]), each["classes"], each["prompts"], f"`{each['data']}`")
            for each in chosen
        ]  # fmt: skip
        parts.append(
            f"## {title}\n\n"
            + _table(("task", "images of", "classes", "prompts", "data"), rows, right={"classes", "prompts"})
        )
    return "\n".join(parts)


# commands


def _cli() -> str:
    program: Any = get_command(app())
    parts = [
        "# Commands\n",
        _help(program.help),
        "| exit status | meaning |\n| --: | :-- |\n" + "".join(
            f"| {status} | {meaning} |\n" for status, meaning in _statuses()
        ),
    ]  # fmt: skip
    for name, command in program.commands.items():
        usage = " ".join(each.metavar for each in command.params if each.param_type_name == "argument")
        parts.append(f"## {name}\n\n```text\nmergecli {name} [OPTIONS] {usage}".rstrip() + "\n```\n")
        parts.append(_help(command.help))
        rows = [(_option(each), _default(each)) for each in command.params]
        parts.append(_table(("option", ""), rows))
    return "\n".join(parts)


def _help(text: str) -> str:
    """A command's help: prose, and the lines that are commands as code."""
    parts: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        line = " ".join(paragraph.split())
        parts.append(f"```sh\n{line}\n```\n" if line.startswith("mergecli ") else _prose(line) + "\n")
    return "\n".join(parts)


def _option(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return f"`{names}`"
    return f"`{names} {parameter.metavar or parameter.type.name.upper().replace(' RANGE', '')}`"


def _default(parameter: Any) -> str:
    value, text = parameter.default, _prose(parameter.help or "")
    if parameter.required:
        text += " Required."
    elif isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
        text += f" Default: `{value}`."
    return text.strip()


def _statuses() -> Iterable[tuple[int, str]]:
    from mergecli import MergecliError

    module: Any = inspect.getmodule(MergecliError)
    documents = _documents(Path(module.__file__), "ExitStatus")
    for status in module.ExitStatus:
        yield int(status), documents.get(status.name, ("", "Done."))[1]


# the Python API


def _api() -> str:
    parts = [
        "# Python API\n",
        "Every name below is imported from `mergecli` itself, when it is first used: `from mergecli import merge`.\n",
    ]
    names = sorted(mergecli.__all__, key=lambda name: (inspect.isclass(getattr(mergecli, name)), name))
    homes = mergecli._homes()  # an alias of a type has no module of its own
    parts += [f"::: {homes[name]}.{name}\n" for name in names]
    return "\n".join(parts)


# dataclasses


def _fields(name: str, without: str | None = None) -> str:
    """The table of a dataclass's fields but one: name, type and the string under it."""
    rows = [
        (f"`{field}`", _words(kind), _prose(text))
        for field, (kind, text) in _documents(_home(name), name).items()
        if field != without
    ]
    if not rows:
        raise ValueError(f"{name}: has no fields")
    if not any(text for *_, text in rows):
        return _table(("key", "value"), [row[:2] for row in rows])
    return _table(("key", "value", ""), rows)


def _words(annotation: str) -> str:
    """A field's type, as somebody says it who writes the file."""
    kind, _, optional = annotation.partition(" | None")
    known = {"str": "string", "int": "whole number", "float": "number", "Source": "source", "tuple[str, ...]": "list of strings",
             "Mapping[str, str]": "table of strings"}  # fmt: skip
    if optional or kind not in known:
        raise ValueError(f"`{annotation}`: say what it is in words")
    return known[kind] + (", may be left out" if annotation != kind else "")


def _home(name: str) -> Path:
    """The file of the package that defines a class, wherever that is."""
    pattern = re.compile(rf"^class {name}\b", re.MULTILINE)
    found = [file for file in sorted(PACKAGE.rglob("*.py")) if pattern.search(file.read_text("utf-8"))]
    if len(found) != 1:
        raise ValueError(f"{name}: expected one class of that name, got {len(found)}")
    return found[0]


def _documents(file: Path, name: str) -> Mapping[str, tuple[str, str]]:
    """Field -> type and the string under it, of a class in a file."""
    tree = ast.parse(file.read_text("utf-8"))
    (found,) = [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.name == name]
    fields: dict[str, tuple[str, str]] = {}
    last = None
    for statement in found.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.target.id
            fields[last] = (ast.unparse(statement.annotation), "")
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            last = statement.targets[0].id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
            text = " ".join(str(statement.value.value).split())
            fields[last] = (fields.get(last, ("", ""))[0], text)
            last = None
        else:
            last = None
    return fields


# Markdown


def _table(heads: tuple[str, ...], rows: Iterable[tuple[object, ...]], right: Iterable[str] = ()) -> str:
    lines = [
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('--:' if head in right else ':--' for head in heads)} |",
    ]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    """The text with everything escaped that Markdown would take for itself, but in code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part
        if part.startswith("`")
        else re.sub(r"([\\*_>\[\]|])", r"\\\1", part.replace("&", "&amp;").replace("<", "&lt;"))
        for part in parts
    )


def _first(text: str) -> str:
    """The text with a capital at the beginning."""
    return _prose(text[:1].upper() + text[1:])
