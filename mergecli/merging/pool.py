"""`ModelPool`: the models, images and processor of a recipe, one at a time, for people who work in Python."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.formats.mixture import has_routing, install_routing, one_tower, routed
from mergecli.formats.opening import model_path, open_source
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError, did_you_mean
from mergecli.storage.sources import Source
from mergecli.storage.store import locate

if TYPE_CHECKING:
    from torch import nn

    from mergecli.data.images import Images

BASE = "base"
"""The name of the pre-trained model in a pool."""


class ModelPool:
    """A base and fine-tuned models, of a recipe or given by name, each loaded when it is asked for.

    Args:
        models: a recipe, its file, or name -> model. A model is a source such as `hf:org/name` or a path, a table as
            recipes have it (`{"source": ..., "revision": ...}`), a module, or a function without arguments that
            gives one. The name `base` is the pre-trained model's.
        tasks: what to evaluate on, tasks or sets such as `ta8`; else the recipe's, else the names of the models.
        changes: changes to the recipe, each `key=value` as for `--set`.

    A pool may have no base: then only methods that need none can merge it, and the processor comes from the first
    model that has one.

    Raises:
        UsageError: a name or a source is wrong; names that begin and end with an underscore are refused.
    """

    def __init__(
        self,
        models: str | Path | Recipe | Mapping[Any, Any],
        *,
        tasks: Sequence[str] | str = (),
        changes: Sequence[str] = (),
    ) -> None:
        self._loaded: dict[str, Any] = {}
        self._folder: Path | None = None
        tasks = tasks.split(",") if isinstance(tasks, str) else tasks
        if isinstance(models, Mapping):
            for name, each in models.items():
                if not isinstance(name, str) or not (
                    callable(each) or isinstance(each, str | Path | Mapping)
                ):
                    raise UsageError(
                        f"pool: `{name}`: expected a source, a table, a module or a function, got {each!r}"
                    )
            self._loaded = {name: each for name, each in models.items() if callable(each)}
            texts = {name: each for name, each in models.items() if name not in self._loaded}
            tuned = {name: texts.get(name, ".") for name in models if name != BASE}
            known = recipe_of(tuned, base=texts.get(BASE), changes=changes)
        else:
            known = recipe_of(models, changes=changes)
        self._recipe = recipe_of(replace(known, eval_tasks=tuple(tasks))) if tasks else known

    @property
    def model_names(self) -> tuple[str, ...]:
        """The fine-tuned models, in the order of every sum."""
        return tuple(self._recipe.tuned)

    @property
    def has_base(self) -> bool:
        """Whether there is a pre-trained model."""
        return self._recipe.base is not None or BASE in self._loaded

    @property
    def recipe(self) -> Recipe:
        """The recipe of the pool, for `merge`, `evaluate` and the other verbs.

        Modules are written to temporary files first, which live as long as the program.
        """
        base = self._written(BASE) if self.has_base else None
        return replace(
            self._recipe, base=base, tuned={name: self._written(name) for name in self.model_names}
        )

    def __len__(self) -> int:
        return len(self.model_names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model_names)

    def __contains__(self, name: object) -> bool:
        return name in self.model_names or (name == BASE and self.has_base)

    def load_model(self, name: str = BASE) -> nn.Module:
        """A vision tower of its own, a `transformers.CLIPVisionModel` in float32 in evaluation mode; or the module
        that the pool was given, itself.

        A task vector is added to the base, an adapter is merged into it. A mixture that routes has its routing layers
        installed, and each image routes by itself.

        Raises:
            InputError: it is a mixture that must be told the task: name it as `FILE#TASK`.
        """
        if (given := self._module(name)) is not None:
            return given
        from mergecli.clip.towers import load_tower

        source = self._source(name)
        base = self._written(BASE) if self.has_base else None
        with ExitStack() as files:
            stored = files.enter_context(open_source(source, base))
            if stored.is_mixture:
                model = load_tower(self._configured(source, base), routed(stored).shared.without_projection())
                install_routing(stored, model)
                weakref.finalize(model, files.pop_all().close)  # tasks' weights are read when they are chosen
                return model
            tower = stored.without_projection()
            if not tower.is_task_vector:
                return load_tower(self._configured(source, base), tower)
            if base is None:
                raise UsageError(f"`{name}` is a task vector, and the pool has no base")
            with open_source(base) as whole:
                return load_tower(self._configured(base, None), tower, one_tower(whole))

    def load_clip_model(self, name: str = BASE) -> Any:
        """A whole `transformers.CLIPModel`: the base's text tower and text projection, with that model's vision tower, as
        `load_model` has it, and with its visual projection if it has one.

        Raises:
            UsageError: the pool has no base, or a module in its place. InputError: the base is no whole CLIP.
        """
        from mergecli.clip.model import load_clip, set_tower
        from mergecli.clip.towers import load_whole

        if BASE in self._loaded:
            raise UsageError(
                "the pool's base is a module, a vision tower; a whole CLIP needs a source as base"
            )
        base = self._source(BASE)
        clip = load_clip(model_path(base))
        if name == BASE:
            return load_whole(clip)
        with ExitStack() as files:
            stored = files.enter_context(open_source(self._written(name), base))
            set_tower(clip, routed(stored).shared if stored.is_mixture else stored)
            model = load_whole(clip)
            if stored.is_mixture:
                install_routing(stored, model.vision_model, model)
                weakref.finalize(model, files.pop_all().close)
        return model

    def load_processor(self) -> Any:
        """The image processor with the tokenizer, a `transformers.CLIPProcessor`; images are resized by PIL.

        Raises:
            UsageError: the pool has no models. InputError: no model of it has a processor.
        """
        from mergecli.clip.towers import load_processor

        if not self.has_base and not self.model_names:
            raise UsageError("the pool has no models")
        source = self._source(BASE if self._recipe.base else self.model_names[0])
        return load_processor(self._configured(source, self._written(BASE) if self.has_base else None))

    def load_train_dataset(self, task: str) -> Images:
        """The images of a task's training split: `dataset[i]` is the i-th as an RGB image, and its label."""
        return self._images(task, train=True)

    def load_test_dataset(self, task: str) -> Images:
        """The images that a task is evaluated on: `dataset[i]` is the i-th as an RGB image, and its label."""
        return self._images(task, train=False)

    def save_model(self, model: nn.Module, path: str | Path) -> Path:
        """Writes a vision tower as every file of ours: a `.safetensors` file, or a folder (no suffix) with its
        configuration that `CLIPVisionModel.from_pretrained` loads. Keys begin with `vision_model.`.

        Raises:
            UsageError: its layers route, which such a file has no place for.
        """
        from mergecli.clip.towers import save_module

        if has_routing(model):
            raise UsageError(
                f"{path}: a tower that routes cannot be saved", "copy the file it was loaded from"
            )
        return save_module(model, Path(path))

    def _source(self, name: str) -> Source:
        if name == BASE:
            if self._recipe.base is None:
                raise UsageError("the pool has no base", "give one under the name `base`")
            return self._recipe.base
        if name not in self.model_names:
            known = (*self.model_names, *((BASE,) if self.has_base else ()))
            raise UsageError(f"the pool has no model `{name}`{did_you_mean(name, known)}")
        return self._recipe.tuned[name]

    def _module(self, name: str) -> nn.Module | None:
        """The module that the pool was given under the name; None where it was given a source."""
        from torch import nn

        if name not in self._loaded:
            return None
        each = self._loaded[name]
        if not isinstance(each, nn.Module):
            each = each()
            if not isinstance(each, nn.Module):
                raise UsageError(f"`{name}`: the function gave {type(each).__name__}, a module was expected")
        return each

    def _written(self, name: str) -> Source:
        """The model's source; of a module, the file that its weights are written to."""
        module = self._module(name)
        if module is None:
            return self._source(name)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mergecli-pool-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / name
        if not hasattr(module, "config"):
            path = path.with_name(f"{name}.safetensors")
        self.save_model(module, path)
        return Source("path", path.name, path=path)

    def _configured(self, source: Source, base: Source | None) -> Path:
        """The folder that has the configuration of the model: its own, or else the base's."""
        for each in (source, *([base] if base else [])):
            for path in (model_path(each), locate(each)):  # a conversion of a file has none beside it
                folder = path if path.is_dir() else path.parent
                if (folder / "config.json").is_file():
                    return folder
        raise InputError(f"{source}: has no `config.json`, and neither has a base")

    def _images(self, task: str, *, train: bool) -> Images:
        from mergecli.data.images import load_images
        from mergecli.data.tasks import find

        found = find(task, self._recipe)
        images = load_images(found, found.train_split if train else None)
        images.warn()
        return images
