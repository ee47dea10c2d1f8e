"""What the files we write say about themselves: version, kind, recipe and digests of the inputs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mergecli.runtime.errors import InputError, toml_text

UNKNOWN_DIGEST = "xxh3:" + "0" * 32
"""As long as a digest; stands for one that is known only when everything has been read."""

_COPIED = ("preprocessor_config.json", "processor_config.json")
_COPIED_WHOLE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "vocab.txt", "merges.txt",
)  # fmt: skip


@functools.cache
def version() -> str:
    """The version of the installed package."""
    from importlib.metadata import version as installed

    return installed("mergecli")


def about(
    kind: str,
    *,
    method: str | None = None,
    recipe: str | None = None,
    inputs: Mapping[str, str] | None = None,
    **others: str,
) -> dict[str, str]:
    """The metadata of a safetensors file of ours.

    Args:
        recipe: the text of the recipe in effect, without folders of paths, so that the file is the same on any machine.
        inputs: input -> digest.
    """
    metadata = {"format": "pt", "mergecli": version(), "kind": kind, **others}
    if method is not None:
        metadata["method"] = method
    if recipe is not None:
        metadata["recipe"] = recipe
    if inputs:
        metadata["inputs"] = json.dumps(dict(inputs))
    return metadata


def inputs_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Input -> digest, as a file of ours says; empty for files of others."""
    try:
        inputs: Any = json.loads(metadata.get("inputs", "{}"))
    except (ValueError, RecursionError):
        return {}
    return {str(name): str(digest) for name, digest in inputs.items()} if isinstance(inputs, dict) else {}


def made_of(metadata: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Setting -> value of the method that made a file of ours, and model -> source, as its recipe has them; empty where
    it does not say. Values are TOML, but for strings."""
    import tomli

    try:
        recipe: Any = tomli.loads(metadata.get("recipe", ""))
        settings, models = dict(recipe.get("method", {})), dict(recipe.get("tuned", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}, {}
    plain = {name: each.get("source") if isinstance(each, dict) else each for name, each in models.items()}
    return (
        {
            f"method.{key}": each if isinstance(each, str) else toml_text(each)
            for key, each in settings.items()
            if key != "name"
        },
        {str(name): str(source) for name, source in plain.items()},
    )


def pool_in(metadata: Mapping[str, str]) -> str | None:
    """The pool that the recipe of a file of ours says; None where it does not say."""
    import tomli

    try:
        pool: Any = tomli.loads(metadata.get("recipe", "")).get("pool")
    except (ValueError, TypeError, RecursionError):
        return None
    return pool if isinstance(pool, str) and pool else None


def layer_lines(metadata: Mapping[str, str]) -> dict[str, str]:
    """Pattern -> settings by layer of the method that made a file of ours, as its recipe has them; empty where it has none."""
    import tomli

    try:
        lines: Any = tomli.loads(metadata.get("recipe", ""))["method"].get("layers", [])
        return {
            _text(line["match"]): ", ".join(
                f"{key} = {toml_text(each)}" for key, each in line.items() if key != "match"
            )
            or "the method's own settings"
            for line in lines
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _text(pattern: object) -> str:
    return ", ".join(pattern) if isinstance(pattern, list) else str(pattern)


def looked_at(metadata: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Task -> `split` and `data` (the digest) of the images that a file's method looked at; empty where it does not say."""
    try:
        tasks: Any = json.loads(metadata.get("adapted_on", "{}"))
        return {str(task): {key: str(each[key]) for key in ("split", "data")} for task, each in tasks.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def other_kind(file: Path) -> str:
    """The `model_type` of a model that is neither a CLIP nor a tower of one, such as `siglip`; else empty."""
    try:
        known: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    kind = cast("dict[str, Any]", known).get("model_type") if isinstance(known, dict) else None
    return kind if isinstance(kind, str) and not (kind == "clip" or kind.startswith("clip_")) else ""


def model_folder_files(origin: Path, *, has_projection: bool = False) -> dict[str, str]:
    """File name -> text of what a Hugging Face folder needs beside the weights, taken from the model at `origin`.

    Of a whole CLIP's configuration the vision tower's part is taken. Empty if `origin` is a single file.

    Args:
        has_projection: whether the visual projection is among the weights.
    """
    if not origin.is_dir():
        return {}
    files = {name: origin / name for name in (*_COPIED, *_COPIED_WHOLE)}
    texts = {name: file.read_text("utf-8", "replace") for name, file in files.items() if file.is_file()}
    if (origin / "config.json").is_file():
        config = _config(origin / "config.json")
        kind = config.get("model_type")
        if kind == "clip":
            texts = {name: text for name, text in texts.items() if name in _COPIED}
            tower = {**config["vision_config"], "projection_dim": config.get("projection_dim", 512)}
            architecture = "CLIPVisionModelWithProjection" if has_projection else "CLIPVisionModel"
            config = {**tower, "model_type": "clip_vision_model", "architectures": [architecture]}
        elif isinstance(kind, str) and _is_dual_encoder(origin, config):
            texts = {name: text for name, text in texts.items() if name in _COPIED}
            config = {"model_type": f"{kind}_vision_model", **config["vision_config"]}
        texts["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return texts


def _is_dual_encoder(origin: Path, config: Mapping[str, Any]) -> bool:
    """Whether the model in a folder has an image and a text tower, of which only the former is merged."""
    from mergecli.storage.checkpoint import open_checkpoint

    if not isinstance(config.get("vision_config"), dict):
        return False
    with open_checkpoint(origin) as stored:
        return stored.is_whole_clip


def _config(file: Path) -> dict[str, Any]:
    """The configuration of a model, known to be a table, with a vision tower's if it is a CLIP's."""
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not a model's configuration: it is not JSON") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: is not a model's configuration: expected a table")
    known = cast("dict[str, Any]", config)
    if known.get("model_type") == "clip" and not isinstance(known.setdefault("vision_config", {}), dict):
        raise InputError(f"{file}: `vision_config`: expected a table")
    return known


def table_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, only_new: bool = False, within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two JSON tables differ; None is a value that is not there.

    Tables in tables are compared entry by entry, and their keys joined by dots.

    Args:
        only_new: compare only the keys of `new`.
    """
    for name in dict.fromkeys([*new, *(() if only_new else old)]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) or isinstance(after, dict):
            inner = f"{within}{name}."
            yield from table_differences(_table(before), _table(after), only_new=only_new, within=inner)
        elif before != after:
            yield f"{within}{name}", before, after


def _table(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
