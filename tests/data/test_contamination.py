"""Checkpoints that were trained on test images: found by source, commit and digest."""

from __future__ import annotations

import pytest

from mergecli.data.contamination import Contaminated, findings, groups, implausible, is_test
from mergecli.data.tasks import names

KNOWN = [
    Contaminated("dtd", ("*org/pool*dtd*",), ("bad1234",), ("900d123",), ("xxh3:1",), "old ones were (here)")
]


def found(*origins: str, digests: tuple[str, ...] = (), tasks: tuple[str, ...] | None = None) -> list[bool]:
    """Whether each finding is certain."""
    return [each.certain for each in findings(origins, digests, tasks, KNOWN)]


@pytest.mark.parametrize(
    ("origin", "certain"),
    [
        ("hf:org/pool#ViT-B-32/DTDVal/model.pt", [False]),
        ("hf:Org/Pool@main#dtd.safetensors", [False]),
        ("hf:org/pool@bad1234567#dtd.safetensors", [True]),
        ("/store/hf/org/pool/bad1234567/dtd.safetensors", [True]),
        ("hf:org/pool@900d123abc#dtd.safetensors", []),
        ("hf:org/pool#svhn.safetensors", []),
        ("hf:org/other_dtd", []),
        ("", []),
    ],
)
def test_a_source_may_be_contaminated_and_a_commit_is_or_is_not(origin: str, certain: list[bool]) -> None:
    assert found("toy:base", origin) == certain


def test_a_digest_is_certain_wherever_the_file_came_from() -> None:
    assert found("mine.safetensors", digests=("xxh3:1",)) == [True]
    assert found("hf:org/pool@900d123abc#dtd", digests=("xxh3:1",)) == [True]
    assert found("mine.safetensors", digests=("xxh3:2",)) == []


def test_only_the_tasks_that_are_asked_for_are_told() -> None:
    assert found("hf:org/pool#dtd", tasks=("dtd", "svhn")) == [False]
    assert found("hf:org/pool#dtd", tasks=("svhn",)) == []


def test_a_finding_says_what_is_known() -> None:
    texts = [
        each.text for origin in ("hf:org/pool#dtd", "bad1234") for each in findings([origin], known=KNOWN)
    ]
    assert texts == [
        "may have been trained on test images of `dtd`: old ones were (here)",
        "was trained on test images of `dtd`: old ones were (here)",
    ]


@pytest.mark.parametrize(
    "origin",
    [
        "hf:nik-dim/tall_masks#single_task/ViT-B-32/DTDVal/nonlinear_finetuned.pt",
        "hf:nik-dim/tall_masks@0123456789abcdef#single_task/ViT-L-14/DTDVal/nonlinear_finetuned.pt",
        "/home/me/checkpoints/ViT-B-16/DTDVal/nonlinear_finetuned.pt",
        "/home/me/task_singular_vectors/models/ViT-B-32/DTD/finetuned.safetensors",
        "/home/me/iso-merging/ViT-L-14/DTD.safetensors",
        "/home/me/actmat/artifacts/checkpoints/ViT-B-16/group-vision/experts/dtd.safetensors",
    ],
)
def test_the_old_tall_pool_is_known(origin: str) -> None:
    (one, *_) = findings([origin])
    assert (one.group.task, one.certain) == ("dtd", False)
    assert "13 December 2024" in one.text


@pytest.mark.parametrize(
    "origin",
    [
        "hf:tanganke/clip-vit-base-patch32_dtd",
        "hf:nik-dim/tall_masks#single_task/ViT-B-32/SVHNVal/nonlinear_finetuned.pt",
        "/home/me/actmat/artifacts/checkpoints/ViT-B-32/group-vision/experts/dtd.safetensors",
        "out/tall_mask.safetensors#dtd",
    ],
)
def test_other_models_are_not_accused(origin: str) -> None:
    assert list(findings([origin])) == []


def test_every_entry_can_be_found_and_says_which_task_it_is_about() -> None:
    assert set(implausible()) <= set(names())
    for each in groups():
        assert each.task in names()
        assert each.sources or each.commits or each.digests
        assert all(pattern == pattern.lower() for pattern in each.sources)
        assert all(len(commit) >= 7 for commit in (*each.commits, *each.clean))


def test_only_the_tasks_own_split_has_its_test_images() -> None:
    assert is_test("dtd", None)
    assert is_test("dtd", "test")
    assert is_test("food101", "validation")
    assert not is_test("dtd", "train")
    assert not is_test("my-birds", "test")
