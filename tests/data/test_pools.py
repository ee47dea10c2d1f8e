"""Pools, by where their models come from."""

from __future__ import annotations

import pytest

from mergecli.data.pools import pool_of, pools


@pytest.mark.parametrize(
    ("sources", "pool"),
    [
        (["hf:tanganke/clip-vit-base-patch32_sun397", "ms:tanganke/clip-vit-base-patch32_mnist@abc"], "fusion_bench"),
        (["hf:nik-dim/tall_masks#single_task/ViT-B-32/MNISTVal/nonlinear_finetuned.pt"], "tall"),
        (["hf:nik-dim/tall_masks#a.pt", "hf:tanganke/clip-vit-base-patch32_mnist"], None),
        (["hf:tanganke/clip-vit-base-patch32_mnist", "mine.safetensors"], None),
        (["hf:openai/clip-vit-base-patch32"], None),
        (["Task_Singular_Vectors/MNISTVal"], "tsv"),
        ([], None),
    ],
)  # fmt: skip
def test_models_are_of_a_pool_if_all_of_them_are(sources: list[str], pool: str | None) -> None:
    assert pool_of(sources) == pool


def test_a_pool_says_what_it_is() -> None:
    assert all(each.what and "." not in each.what[-1:] for each in pools().values())
    assert list(pools()) == [
        "fusion_bench",
        "task_arithmetic",
        "tall",
        "tsv",
        "symerge",
        "act_mat",
        "act_mat_lora",
    ]
