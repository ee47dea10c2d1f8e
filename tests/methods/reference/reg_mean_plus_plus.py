"""RegMean++: the inputs of each layer are those that it has in a whole, half merged model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from tests.methods.reference._linear_layers import closed_form, inputs_of
from tests.methods.reference._vision_model import Called
from tests.methods.reference._weights import Weights


def reg_mean_plus_plus(
    tower: nn.Module, tuned: Sequence[Weights], pixels: Sequence[Tensor], alpha: float
) -> Weights:
    """Each layer by RegMean on the inputs it has in a whole model: the layers before it merged, itself of the task."""
    merged = {name: sum(model[name] for model in tuned) / len(tuned) for name in tuned[0]}  # type: ignore[misc]
    count = len(tower.encoder.layers)  # type: ignore[union-attr]
    for number in range(count):
        own = [name for name in merged if f".layers.{number}." in name]
        inputs: list[Weights] = []
        for model, images in zip(tuned, pixels, strict=True):
            called = Called(copy.deepcopy(tower))
            called.load_state_dict(merged | {name: model[name] for name in own})
            found = inputs_of(called, lambda called=called, images=images: called.vision_model(images))
            inputs.append({name: found[name] for name in own if name in found})
        merged |= {
            name: closed_form(
                [model[name] for model in tuned], [each[name] for each in inputs], alpha
            ).float()
            for name in inputs[0]
        }
    return merged
