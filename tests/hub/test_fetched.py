"""What is said of sources that are not on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecli.hub.fetch import fetch
from mergecli.hub.fetched import expect_all
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError
from mergecli.storage.sources import Source, parse_source
from tests.hub.conftest import Hubs


def source(text: str) -> Source:
    return parse_source(text, Path())


def message_of(recipe: Recipe | None, *sources: Source | None) -> str:
    with pytest.raises(InputError) as error:
        expect_all(sources, recipe)
    return str(error.value)


def models_of(recipe: Recipe) -> list[Source | None]:
    return [recipe.base, *recipe.tuned.values()]


def test_all_that_is_missing_of_a_recipe_is_named_and_fetched_with_the_recipe(recipe: Path) -> None:
    read = recipe_of(recipe.name)
    assert message_of(read, *models_of(read), source("toy:base")) == (
        "2 of 3 sources have not been fetched:\n  hf:org/base\n  hf:org/tuned\n"
        f"hint: `mergecli fetch {recipe.name}` brings what is missing; it needs a network"
    )


def test_what_the_recipes_file_does_not_name_is_fetched_by_its_own_name(recipe: Path) -> None:
    read = recipe_of(recipe.name, changes=["tuned.more=hf:org/more"])
    command = message_of(read, *models_of(read)).rpartition("hint: ")[2]
    assert command == f"`mergecli fetch {recipe.name} hf:org/more` brings what is missing; it needs a network"
    assert message_of(None, source("hf:org/more")) == (
        "hf:org/more: has not been fetched\n"
        "hint: `mergecli fetch hf:org/more` brings what is missing; it needs a network"
    )


def test_what_a_lock_names_is_fetched_as_the_lock_says(hubs: Hubs, recipe: Path, tmp_path: Path) -> None:
    fetch(recipe, into=tmp_path / "elsewhere")
    read = recipe_of(recipe.name)
    command = message_of(read, *models_of(read)).rpartition("hint: ")[2]
    assert command == f"`mergecli fetch --locked {recipe.name}` brings what is missing; it needs a network"
    assert "commit " in message_of(read, read.base)
    fetch(recipe, locked=True)
    expect_all(models_of(read), read)


def test_files_that_are_missing_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").touch()
    message = message_of(None, source("a.safetensors"), source("hf:org/b"), source("there.safetensors"))
    assert message == (
        "2 of 3 sources are not on this machine:\n"
        "  a.safetensors: no such file or folder\n"
        "  hf:org/b: has not been fetched\n"
        "hint: `mergecli fetch hf:org/b` brings what is missing; it needs a network"
    )
