"""The model card of a merge: the `README.md` that hubs show, and the front matter that they read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecli import methods
from mergecli.results.card_file import CARD, CardFile
from mergecli.results.cells import Column
from mergecli.results.licenses import forbids_changes, licenses, strictest
from mergecli.results.result import Evaluation, TaskScore
from mergecli.results.tables import Table
from mergecli.runtime.errors import InputError, MergecliError, UsageError, quoted
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import inputs_of, other_kind
from mergecli.storage.sources import HUBS, Source, parse_source
from mergecli.storage.store import locate

_RESULTS = "\n## Results\n"


def card_path(model: Path) -> Path:
    """Where the card of a model lies: in its folder, or beside its file."""
    return (model.parent if model.suffix else model) / CARD


def check_card(model: Path) -> None:
    """Finds before the work what would keep a card from being written.

    Raises:
        UsageError: there is one whose section was edited, or that is another file's. InputError: it cannot be read.
    """
    card = CardFile.read(card_path(model))
    card.check()
    if card.describes not in ("", _name_in_card(model)):
        raise UsageError(
            f"{card.path}: is the card of `{card.describes}`, and a folder has one card",
            "name another folder, or leave the card as it is with `--no-card`",
        )


def write_card(model: Path, sources: Sequence[Source] | None = None, digest: str | None = None) -> Path:
    """Writes the card of a merged model, without results.

    Args:
        sources: the models that were merged, in which their licenses are looked for; by default those that the file names,
            as far as they come from a hub.
        digest: of the model, if it is known.
    """
    with open_checkpoint(_weights(model)) as stored:
        merge = _Merge.of(model, stored, sources, digest)
    card = CardFile.read(card_path(model))
    card.write(merge.front(), merge.text() + _no_results(merge), _name_in_card(model))
    return card.path


def add_results(model: Path, results: Sequence[Evaluation], table: Table) -> Path:
    """Puts the table into the card of a model, and the results that are the model's own into the front matter, where hubs
    read them. A card is made if there is none.

    Raises:
        InputError: none of the results is of this model, or it is an adapter.
    """
    check_card(model)
    if _weights(model) != model:
        raise InputError(
            f"{model}: is an adapter: results are of its base with it, and not of the adapter",
            "write them into its README.md yourself, before or after the marked part",
        )
    with open_checkpoint(model) as stored:
        digest = stored.digest()
    own = [each for each in results if each.checkpoint.get("digest") == digest]
    if not own:
        names = quoted(each.name for each in results)
        raise InputError(
            f"{model}: none of the results is of this model: {names} {'has' if len(results) == 1 else 'have'} another digest",
            f"evaluate it: `mergecli eval {model} ... -o RESULT.json`",
        )
    if CardFile.read(card_path(model)).section is None:
        write_card(model, digest=digest)
    card = CardFile.read(card_path(model))
    before = (card.section or "").rpartition(_RESULTS)[0]
    text = f"{before}{_RESULTS}\n{table.text('md')}"
    card.write({"model-index": _model_index(model, own)}, text, card.describes)
    return card.path


_ADAPTER = "adapter_model.safetensors"


def _weights(model: Path) -> Path:
    """The file or folder that is opened: of an adapter, the file in its folder."""
    return model / _ADAPTER if (model / _ADAPTER).is_file() else model


@dataclass(frozen=True)
class _Merge:
    """What a merged file says about itself, and where its licenses are."""

    model: Path
    metadata: Mapping[str, str]
    parameters: int
    dtypes: tuple[str, ...]
    digest: str
    models: Mapping[str, Any]
    """`base` and tasks -> source, as the recipe in the file has it."""
    licenses: Mapping[str, str | None]
    has_projection: bool = False
    """Whether the visual projection was merged too."""
    other_kind: str = ""
    """Such as `siglip`, of a model that is no CLIP; else empty."""

    @classmethod
    def of(
        cls, model: Path, stored: Checkpoint, sources: Sequence[Source] | None, digest: str | None
    ) -> _Merge:
        """Raises InputError if the file does not say that it was merged."""
        import tomli

        try:
            recipe: dict[str, Any] = tomli.loads(stored.metadata.get("recipe", ""))
            models = {**({"base": recipe["base"]} if "base" in recipe else {}), **recipe.get("tuned", {})}
        except (ValueError, TypeError, RecursionError):
            models = {}
        if not models or "method" not in stored.metadata:
            raise InputError(
                f"{model}: does not say that it was merged", "`mergecli merge` writes models that do"
            )
        found = (
            sources
            if sources is not None
            else [each for value in models.values() for each in _sources(value)]
        )
        return cls(
            model, stored.metadata, stored.parameters, tuple(sorted({each.dtype for each in stored.entries.values()})),
            digest or stored.digest(), models, licenses(found), stored.has_projection, _other_kind(model, found),
        )  # fmt: skip

    @property
    def method(self) -> str:
        return self.metadata["method"]

    @property
    def is_transformers(self) -> bool:
        """Whether transformers can load it: a folder with a configuration."""
        return (self.model / "config.json").is_file()

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, which is added to the base."""
        return self.metadata.get("kind") == "adapter"

    def front(self) -> dict[str, Any]:
        """The keys of the front matter; None where there is nothing to say."""
        models = {"base": self.models.get("base")} if self.is_adapter else self.models
        names = [each.name for value in models.values() for each in _sources(value) if each.kind in HUBS]
        library = "peft" if self.is_adapter else "transformers" if self.is_transformers else "mergecli"
        return {
            "base_model": list(dict.fromkeys(names)),
            "base_model_relation": "adapter" if self.is_adapter else "merge",
            "library_name": library,
            "tags": [
                "merge",
                "mergecli",
                self.other_kind or "clip",
                *["lora"] * self.is_adapter,
                self.method,
            ],
            "license": strictest(self.licenses)[0],
            "model-index": None,
        }

    def text(self) -> str:
        """The section, up to its results."""
        return "\n".join(
            [
                f"# {_markdown(f'Merge of {self._tasks()} by {self.method}')}\n",
                f"{self._what()}\n",
                self._inputs(),
                *self._use(),
                "## Recipe\n",
                f"The same models and this recipe give the same bytes with mergecli {self.metadata.get('mergecli', '')}.\n",
                _fenced(self.metadata["recipe"], "toml"),
                "## License\n",
                f"{self._license()}\n",
            ]
        )

    def _tasks(self) -> str:
        """The models, but for the base; the folder's name would make the same merge another card."""
        names = [name for name in self.models if name != "base"]
        shown = names[:8] + ([f"{len(names) - 8} more"] if len(names) > 8 else [])
        return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))

    def _what(self) -> str:
        title = f" ({methods.find(self.method).title})" if self.method in methods.names() else ""
        count = len(self.models) - ("base" in self.models)
        of = f"`{self.other_kind}`" if self.other_kind else "CLIP"
        what = f"{of} vision towers" if self.metadata.get("kind") == "mixture" else f"A {of} vision tower"
        what = f"A LoRA adapter of a {of} vision tower" if self.is_adapter else what
        return (
            f"{what}, merged from {count} fine-tuned model{'s' if count > 1 else ''} by `{self.method}`{title}. "
            f"{self.parameters:,} parameters in {' and '.join(self.dtypes)}; digest of the weights `{self.digest}`."
        )

    def _inputs(self) -> str:
        digests = inputs_of(self.metadata)
        others = [name for name in digests if name not in self.models]
        rows = [(name, _written(value), digests.get(name)) for name, value in self.models.items()]
        rows += [(name, "", digests[name]) for name in others]
        return Table((Column("model"), Column("source"), Column("digest")), tuple(rows)).text("md")

    def _use(self) -> Iterator[str]:
        if self.is_adapter:
            base = (
                "\nbase = ...  # the vision tower of the base in the table above\n"
                if self.other_kind
                else "from transformers import CLIPVisionModel\n\n"
                'base = CLIPVisionModel.from_pretrained("BASE")  # the base in the table above\n'
            )
            yield "## Use\n"
            yield _fenced(
                f"from peft import PeftModel\n{base}"
                'tower = PeftModel.from_pretrained(base, "FOLDER")  # this folder, or the name of this repository\n',
                "python",
            )
        if self.is_transformers:
            kind = "CLIPVisionModelWithProjection" if self.has_projection else "CLIPVisionModel"
            kind = "AutoModel" if self.other_kind else kind
            yield "## Use\n"
            yield _fenced(
                f"from transformers import {kind}\n\n"
                f'tower = {kind}.from_pretrained("FOLDER")  # this folder, or the name of this repository\n',
                "python",
            )

    def _license(self) -> str:
        chosen, why = strictest(self.licenses)
        unchanged = [name for name, each in self.licenses.items() if each and forbids_changes(each)]
        more = (
            f" It allows no changed copies: {quoted(unchanged)} may not be shared merged."
            if unchanged
            else ""
        )
        return f"{why}{more} A merge carries the terms of every model in it." if chosen or more else why


def _no_results(merge: _Merge) -> str:
    if merge.is_adapter:  # results are of the tower with it, which has another digest
        return f"{_RESULTS}\nNone yet. `mergecli eval FOLDER --recipe RECIPE` evaluates the base with the adapter.\n"
    model = merge.model.name if merge.model.suffix else "FOLDER"
    return (
        f"{_RESULTS}\nNone yet. `mergecli eval {model} -o RESULT.json` and "
        f"`mergecli report RESULT.json --card {model}` add them.\n"
    )


def _name_in_card(model: Path) -> str:
    """What a card is of: a file beside it, or its folder."""
    return model.name if model.suffix else "."


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", text)


def _sources(value: Any) -> Iterator[Source]:
    """The sources from hubs and the toys in an entry of a recipe: the model's and its adapter's."""
    written = [value.get("source"), value.get("adapter")] if isinstance(value, dict) else [value]
    for each in written:
        try:
            source = parse_source(str(each), Path()) if each else None
        except UsageError:
            source = Source("path", str(each))
        if source:
            yield source


def _other_kind(model: Path, sources: Sequence[Source]) -> str:
    """What `other_kind` says of the merge, or where that has no configuration of the models that were merged."""
    folders = [model] if (model / "config.json").is_file() else []
    for each in sources if not folders else ():
        with suppress(MergecliError):
            folders.append(locate(each))
    found = (other_kind(folder / "config.json").removesuffix("_vision_model") for folder in folders)
    return next(filter(None, found), "")


def _written(value: Any) -> str:
    return ", ".join(f"{key} {each}" if key != "source" else str(each) for key, each in value.items()) \
        if isinstance(value, dict) else str(value)  # fmt: skip


def _fenced(text: str, language: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text}{fence}\n"


def _model_index(model: Path, results: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The results as the Hub's `model-index`, of which its client makes `EvalResult`s."""
    entries = [_index_entry(task, score) for each in results for task, score in each.tasks.items()]
    unique = {str(each): each for each in entries}
    return [{"name": model.stem if model.suffix else model.absolute().name, "results": list(unique.values())}]


def _index_entry(task: str, score: TaskScore) -> dict[str, Any]:
    source, _, revision = str(score.data.get("source", task)).partition("#")[0].partition("@")
    kind, colon, name = source.partition(":")
    arguments = {
        key: value
        for key in ("limit", "corruption", "severity")
        if (value := getattr(score, key)) is not None
    }
    return {
        "task": {"type": "zero-shot-image-classification", "name": "Zero-shot image classification"},
        "dataset": {
            "name": task,
            "type": name if colon and kind in HUBS else source,
            "split": score.split,
            **({"revision": revision} if revision else {}),
            **({"args": arguments} if arguments else {}),
        },
        "metrics": [
            {"type": "accuracy", "value": score.accuracy, "name": f"accuracy on {score.images:,} images"},
        ],
    }
