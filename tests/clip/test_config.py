from __future__ import annotations

import json

import pytest

from mergecli.clip.config import ClipConfig, TextConfig, VisionConfig, read_config
from mergecli.runtime.errors import InputError


def written(folder, **table):
    (folder / "config.json").write_text(json.dumps(table))
    return folder / "config.json"


def of_transformers(folder):
    from transformers import CLIPConfig

    known = CLIPConfig.from_pretrained(folder)
    vision, text = (
        kind(**{name: getattr(own, name) for name in kind.__dataclass_fields__})
        for kind, own in ((VisionConfig, known.vision_config), (TextConfig, known.text_config))
    )
    return ClipConfig(vision, text, known.projection_dim)


OPENAI_LARGE = {
    "model_type": "clip",
    "projection_dim": 768,
    "torch_dtype": "float32",
    "text_config": {"hidden_size": 768, "eos_token_id": 2, "num_attention_heads": 12, "top_k": 50, "id2label": {"0": "A"}},
    "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "dropout": 0.0},
    "vision_config_dict": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                           "num_hidden_layers": 24, "patch_size": 14},
}  # fmt: skip
LAION_HUGE = {
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                    "num_hidden_layers": 24, "eos_token_id": 2, "model_type": "clip_text_model"},
    "text_config_dict": None,
    "vision_config": {"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16,
                      "num_hidden_layers": 32, "patch_size": 14, "image_size": [224, 224], "layer_norm_eps": 1e-6},
    "vision_config_dict": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "table", [{}, OPENAI_LARGE, LAION_HUGE, {"text_config": None, "projection_dim": None}]
)
def test_a_configuration_is_read_as_transformers_reads_it(tmp_path, table):
    got = read_config(written(tmp_path, **table))
    if table is LAION_HUGE:  # transformers keeps both sides
        table = {**table, "vision_config": {**table["vision_config"], "image_size": 224}}
    if "projection_dim" in table and table["projection_dim"] is None:
        table = {}
    written(tmp_path, **table)
    assert got == of_transformers(tmp_path)


def test_everything_that_cannot_be_used_is_named_at_once(tmp_path):
    file = written(
        tmp_path,
        projection_dim=0,
        vision_config={"hidden_size": "wide", "patch_size": [14, 16], "hidden_act": "quick_gellu"},
        text_config={"layer_norm_eps": -1},
    )
    with pytest.raises(InputError) as caught:
        read_config(file)
    assert caught.value.message.splitlines() == [
        f"{tmp_path}: cannot be loaded as a CLIP: `config.json` has values that cannot be used:",
        '  `vision_config.hidden_size`: expected a whole number from 1, got "wide"',
        "  `vision_config.hidden_act`: expected one of `quick_gelu`, `gelu`, `gelu_new`, `gelu_pytorch_tanh`, `relu`, "
        '`silu`, `swish`, got "quick_gellu" (did you mean `quick_gelu`?)',
        "  `vision_config.patch_size`: expected a whole number from 1, got [14, 16]",
        "  `text_config.layer_norm_eps`: expected a number from 0, got -1",
        "  `projection_dim`: expected a whole number above 0, got 0",
    ]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"vision_config": {"hidden_size": 10}},
         "`vision_config.num_attention_heads`: 12 heads do not divide a width of 10"),
        ({"text_config": {"num_hidden_layers": True}},
         "`text_config.num_hidden_layers`: expected a whole number from 0, got true"),
        ({"text_config": {"eos_token_id": [1, 2]}},
         "`text_config.eos_token_id`: expected a whole number from 0, got [1, 2]"),
        ({"text_config": [1]}, "`text_config`: expected a table, got [1]"),
    ],
)  # fmt: skip
def test_tables_and_heads_that_mean_nothing_are_refused(tmp_path, table, line):
    with pytest.raises(InputError) as caught:
        read_config(written(tmp_path, **table))
    assert caught.value.message.splitlines()[1:] == [f"  {line}"]
