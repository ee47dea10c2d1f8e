from __future__ import annotations

from pathlib import Path

import pytest

from mergecli.runtime.errors import UsageError
from mergecli.storage.sources import named_sources, parse_source


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision"),
    [
        ("hf:openai/clip-vit-base-patch32", "hf", "openai/clip-vit-base-patch32", None),
        ("hf:org/name@v1.0", "hf", "org/name", "v1.0"),
        ("ms:openai-mirror/clip@abc", "ms", "openai-mirror/clip", "abc"),
        ("toy:base", "toy", "base", None),
        ("models/a.safetensors", "path", "models/a.safetensors", None),
        ("openai/clip", "path", "openai/clip", None),
    ],
)
def test_a_source_means_what_its_prefix_says(text: str, kind: str, name: str, revision: str | None) -> None:
    source = parse_source(text, Path("/anchor"))
    assert (source.kind, source.name, source.revision, str(source)) == (kind, name, revision, text)
    assert source.path == (Path("/anchor") / text if kind == "path" else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hff:org/name", r"unknown prefix `hff:` \(did you mean `hf`\?\)"),
        ("hf:", r"source `hf:`: expected `hf:org/name` or `hf:org/name@revision`"),
        ("hf:a/b/c", r"expected `hf:org/name` or `hf:org/name@revision`"),
        ("toy:a/b", r"expected `toy:name`"),
        ("  ", "a source is empty"),
    ],
)
def test_a_source_of_no_known_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(text, Path())


def test_a_file_whose_name_has_a_colon_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "ab:c").touch()
    assert parse_source("ab:c", tmp_path).kind == "path"


def test_models_on_the_command_line_get_their_names() -> None:
    got = named_sources(
        [
            "tv/sun397.safetensors",
            "cars=x/y.safetensors",
            "toy:digits",
            "runs/dtd/model.safetensors",
            "hf:a/b@v1",
        ]
    )
    assert got == {
        "sun397": "tv/sun397.safetensors", "cars": "x/y.safetensors", "digits": "toy:digits",
        "dtd": "runs/dtd/model.safetensors", "b": "hf:a/b@v1",
    }  # fmt: skip


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(
        UsageError,
        match=r"two models are called `a`: x/a.safetensors and y/a.safetensors\nhint: write `NAME=SOURCE`, each with a name of its own",
    ):
        named_sources(["x/a.safetensors", "y/a.safetensors"])


@pytest.mark.parametrize(
    ("argument", "name", "source"),
    [
        ("epoch=3-step=1000.safetensors", "epoch=3-step=1000", "epoch=3-step=1000.safetensors"),
        ("runs/epoch=3-step=1000.safetensors", "epoch=3-step=1000", "runs/epoch=3-step=1000.safetensors"),
        ("last=epoch=3-step=1000.safetensors", "last", "epoch=3-step=1000.safetensors"),
        ("epoch=4.safetensors", "epoch", "4.safetensors"),
        ("lr=0.1", "lr=0.1", "lr=0.1"),
        ("mix=1.safetensors#sun", "mix=1-sun", "mix=1.safetensors#sun"),
    ],
    ids=["a file", "in a folder", "named", "no such file", "a folder", "of a task"],
)
def test_an_equals_sign_in_the_name_of_a_file_that_is_there_gives_no_name(
    tmp_path: Path, argument: str, name: str, source: str
) -> None:
    for file in ("epoch=3-step=1000.safetensors", "mix=1.safetensors"):
        (tmp_path / file).touch()
    (tmp_path / "lr=0.1").mkdir()
    assert named_sources([argument]) == {name: source}


def test_an_argument_that_is_a_file_and_names_another_one_is_refused(tmp_path: Path) -> None:
    for file in ("a=b.safetensors", "b.safetensors"):
        (tmp_path / file).touch()
    with pytest.raises(UsageError) as caught:
        named_sources(["a=b.safetensors"])
    assert str(caught.value) == (
        "`a=b.safetensors`: is a file, and so is b.safetensors\n"
        "hint: write `./a=b.safetensors` for the first, `a=./b.safetensors` for the second"
    )
    assert named_sources(["./a=b.safetensors", "a=./b.safetensors"]) == {
        "a=b": "./a=b.safetensors", "a": "./b.safetensors",
    }  # fmt: skip
