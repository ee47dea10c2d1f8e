from __future__ import annotations

from dataclasses import replace

import pytest

from mergecli.data import tasks as catalogue
from mergecli.data.pools import pools
from mergecli.results.cells import Estimate
from mergecli.results.references import IMAGES, find, names
from mergecli.results.report import report
from mergecli.results.result import Evaluation, TaskScore
from mergecli.runtime.errors import UsageError
from tests.results.test_report import column, result
from tests.results.test_report import names as columns

B32 = "clip-vit-base-patch32"
TA8 = f"{B32}-ta8"


def like_published(name: str, method: str, row: str, reference: str = TA8) -> Evaluation:
    """A result as like a published row as counts of images can be."""
    scores: dict[str, TaskScore] = {}
    for name_of_task, accuracy in find(reference).rows[row].accuracies.items():
        task, images = catalogue.find(name_of_task), IMAGES[name_of_task]
        correct = round(accuracy * images)
        scores[name_of_task] = TaskScore(
            correct / images, 1.0, 1.0, correct, images, "test", {"source": task.data.label, "fingerprint": "f"},
            catalogue.digest(task.classes or ()), catalogue.digest(task.templates),
        )  # fmt: skip
    about = {"name": name, "path": name, "digest": "d", "kind": "checkpoint", "method": method}
    return Evaluation(about, {"path": f"hf:openai/{B32}", "digest": "d"}, 87_456_000, scores, 128, "float32")


def test_every_published_table_has_a_name() -> None:
    corruptions = ("clean", "contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur",
                   "pixelate", "spatter")  # fmt: skip
    merged = {"clip-vit-base-patch16-ta8", TA8, "clip-vit-large-patch14-ta8"}
    lora = {f"individual-clip-vit-base-patch16-ta8-{each}" for each in ("lora", "l-lora")}
    averages = {name for name in names() if find(name).averaged}
    assert set(names()) - averages == merged | lora | {f"individual-{name}" for name in merged} | {
        f"{B32}-generalization-1", f"{B32}-generalization-2", *(f"{B32}-robustness-{each}" for each in corruptions),
    }  # fmt: skip
    small, large = "clip-vit-base-patch32", "clip-vit-large-patch14"
    every = (small, "clip-vit-base-patch16", large)
    assert averages == {
        *(f"{name}-tsv-pool{count}" for name in every for count in ("", "-14", "-20")),
        *(f"{name}-{end}" for name in every for end in ("act-mat-pool", "act-mat-lora-pool", "ta8-averages", "tall20-averages")),
        *(f"{name}-{end}" for name in (small, large) for end in ("ta-pool", "symerge-pool-14", "symerge-pool-20")),
    }  # fmt: skip


def test_tables_of_averages_name_their_pool_their_tasks_and_their_source() -> None:
    for reference in map(find, names()):
        if reference.averaged:
            assert reference.pool in pools()
            assert reference.sources
            assert all(
                not row.accuracies and 0.3 < row.averages["all"] < 1 for row in reference.rows.values()
            )
    tsv = find("clip-vit-base-patch16-tsv-pool-20")
    assert (tsv.pool, len(tsv.tasks)) == ("tsv", 20)
    assert {"emnist_digits"} == set(tsv.tasks) - set(catalogue.expand(("tall20",)))
    assert (tsv.rows["ESM"].averages, tsv.rows["ESM++ (rank 8)"].averages) == ({"all": 0.853}, {"all": 0.885})
    assert find("clip-vit-large-patch14-ta-pool").rows["SyMerge"].averages == {"all": 0.941}
    assert find("clip-vit-base-patch32-ta8-averages").rows["Iso-C + LARV"].averages == {"all": 0.859}


@pytest.mark.parametrize("name", [name for name in names() if not find(name).averaged])
def test_printed_averages_are_the_means_of_the_printed_accuracies_within_what_rounding_allows(
    name: str,
) -> None:
    """Within 0.3 points, and but for one cell of the page that is 1.95 points off."""
    reference = find(name)
    for row in reference.rows.values():
        assert tuple(row.accuracies) == reference.tasks
        for part, average in row.averages.items():
            if (name, row.name, part) == (f"{B32}-generalization-2", "Pre-trained", "unseen"):
                continue
            chosen = [v for task, v in row.accuracies.items() if part == "all" or (task in reference.seen) == (part == "seen")]  # fmt: skip
            assert sum(chosen) / len(chosen) == pytest.approx(average, abs=0.003 + 1e-9), (row.name, part)


def test_the_published_numbers_are_those_of_the_page() -> None:
    b32 = find(TA8).rows
    names = ("Pre-trained", "Fine-tuned (STL)", "Weight-Ensembling MoE")
    assert [b32[name].averages["all"] for name in names] == [0.482, 0.903, 0.892]
    assert find("clip-vit-large-patch14-ta8").rows["RegMean++"].averages["all"] == 0.91
    unseen = find(f"{B32}-generalization-2").rows["RegMean"]
    assert (unseen.averages, unseen.accuracies["svhn"]) == ({"seen": 0.83, "unseen": 0.492}, 0.49)
    assert find(f"{B32}-robustness-pixelate").rows["Fisher Merging"].accuracies["stanford-cars"] == 0.022
    assert find("individual-clip-vit-base-patch16-ta8-lora").rows["SVHN"].averages["all"] == 0.626
    with pytest.raises(
        UsageError, match=r"unknown reference `clip-vit-base-patch32-ta9` \(did you mean `clip-v"
    ):
        find("clip-vit-base-patch32-ta9")
    with pytest.raises(UsageError, match="unknown reference ``"):
        report([like_published("mine", "ties", "Ties-Merging")], reference="")


def test_a_reference_adds_the_published_average_and_the_difference() -> None:
    table = report([like_published("mine", "ties", "Ties-Merging")], reference=TA8)
    assert columns(table)[-2:] == ["reference", "difference"]
    assert table.rows[0][-2] == 0.722
    assert table.rows[0][-1] == pytest.approx(0, abs=5e-4)  # the page rounds to 0.1 points
    assert table.text("md").splitlines()[2].endswith("| 72.2 | 72.2 | +0.0 |")
    assert len(table.warnings) == 1
    assert "`mergecli info CHECKPOINT`" in table.warnings[0]


def of_models(owner: str = "tanganke", **others: str) -> dict[str, str]:
    return {task: f"hf:{owner}/{B32}_{task}@main" for task in find(TA8).tasks} | others


def departures(result: Evaluation, reference: str = TA8) -> list[str]:
    return [
        line.removeprefix(f"not as in `{reference}`: ")
        for line in report([result], reference=reference).warnings
    ]


def test_the_merged_models_are_held_against_those_of_the_table() -> None:
    good = like_published("mine", "ties", "Ties-Merging")
    assert departures(replace(good, models=of_models())) == []
    assert departures(replace(good, models=of_models(mnist="hf:me/mine"))) == [
        f"`mnist`: the model is not known to be `{B32}_mnist`"
    ]
    assert departures(replace(good, models=of_models(mnist="mnist.safetensors")))[0].startswith(
        "`mnist`: the model"
    )
    few = {task: source for task, source in of_models().items() if task != "dtd"}
    assert departures(
        replace(
            good,
            models=few,
        )
    ) == ["merged without the models of `dtd`"]
    more = of_models(cifar10=f"hf:tanganke/{B32}_cifar10")
    assert departures(replace(good, models=more)) == ["merged with models of `cifar10` too"]
    base = replace(good, checkpoint={**good.checkpoint, "method": "pretrained"})
    assert departures(base) == []
    single = replace(good, checkpoint={**good.checkpoint, "method": None, "path": f"hf:tanganke/{B32}_mnist"})
    assert departures(single, f"individual-{TA8}") == []


def test_settings_that_are_not_those_of_the_table_are_said() -> None:
    good = replace(like_published("mine", "ties", "Ties-Merging"), models=of_models())
    usual = replace(good, checkpoint={**good.checkpoint, "method.density": "0.2", "method.aggregate": "sum"})
    assert departures(usual) == []
    other = replace(good, checkpoint={**good.checkpoint, "method.density": "0.5"})
    assert departures(other) == ["`density` is 0.5, not 0.2, which the published table is taken to have"]


def test_with_intervals_a_difference_to_a_published_number_says_whether_it_is_more_than_chance() -> None:
    same = like_published("mine", "ties", "Ties-Merging")
    worse = like_published("mine", "ties", "Simple Averaging")
    near, far = (report([each], reference=TA8, intervals=True).rows[0][-1] for each in (same, worse))
    assert isinstance(near, Estimate)
    assert isinstance(far, Estimate)
    assert (near.significant, far.significant) == (False, True)
    assert far.value == pytest.approx(0.665 - 0.722, abs=1e-3)
    assert far.low < far.value < far.high < 0


def test_an_average_of_other_tasks_is_compared_over_the_shared_ones() -> None:
    table = report([result("m", "ties", mnist=0.75, dtd=0.5, kmnist=0.1)], reference=TA8)
    theirs = (0.941 + 0.54) / 2
    assert table.rows[0][-2:] == pytest.approx((theirs, 0.625 - theirs))
    assert any("compared over the tasks that are there" in line for line in table.warnings)
    assert any("has `kmnist` too: not compared" in line for line in table.warnings)


def test_a_method_that_is_not_published_has_no_reference() -> None:
    assert report([result("m", "tsv_m", mnist=0.5)], reference=TA8).rows[0][-2:] == (None, None)


def test_everything_in_which_a_result_departs_from_the_reference_is_said() -> None:
    good = like_published("mine", "ties", "Ties-Merging")
    score = good.tasks["mnist"]

    def warned(result: Evaluation, reference: str = TA8) -> list[str]:
        lines = report([result], reference=reference).warnings
        return [
            line.removeprefix(f"not as in `{reference}`: ") for line in lines if line.startswith("not as")
        ]

    def changed(**change: object) -> Evaluation:
        return replace(good, tasks=dict(good.tasks) | {"mnist": replace(score, **change)})  # pyright: ignore

    assert warned(good) == []
    assert warned(changed(classes="x")) == ["`mnist`: other class names"]
    assert warned(changed(templates="x")) == ["`mnist`: other templates"]
    assert warned(changed(split="train")) == ["`mnist`: split `train`, not `test`"]
    assert warned(changed(images=100, correct=94, accuracy=0.94)) == ["`mnist`: 100 images, not 10,000"]
    assert warned(changed(data={"source": "birds"})) == [
        "`mnist`: data that are not known to be the published ones"
    ]
    assert warned(changed(data={"source": "hf:ylecun/mnist@abc"})) == []
    assert warned(replace(good, dtype="bfloat16")) == ["computed in bfloat16, not float32"]
    assert warned(replace(good, clip={"path": "toy:base"})) == [f"the CLIP is `toy:base`, not `{B32}`"]
    assert warned(replace(good, clip={"path": f"ms:openai-mirror/{B32}@main"})) == []
    assert warned(replace(good, parameters=1000)) == ["the vision tower has 1,000 parameters, not 87,456,000"]
    assert warned(replace(good, parameters=573_000_000)) == []  # a mixture of experts is larger


def test_a_departure_of_several_models_and_tasks_is_one_line() -> None:
    ours = [result("a", "ties", mnist=0.5, dtd=0.5), result("b", "average", mnist=0.5), like_published("c", "ties", "Ties-Merging")]  # fmt: skip
    lines = report(ours, reference=TA8).warnings
    assert f"not as in `{TA8}`: `mnist`, `dtd`: other templates (`a`, `b`)" in lines


def test_published_rows_stand_beside_ours_and_are_marked() -> None:
    table = report([result("m", "ties", mnist=0.75, dtd=0.5)], reference=TA8, reference_rows=True)
    assert column(table, "model")[:2] == ["m", "Pre-trained"]
    assert column(table, "method")[1:] == ["published"] * 15
    assert table.rows[1][2:5] == (0.482, 0.439, pytest.approx((0.482 + 0.439) / 2))
    ordered = report(
        [result("m", "ties", mnist=0.75, dtd=0.5)], reference=TA8, reference_rows=True, sort="average"
    )
    averages = column(ordered, "average")
    assert averages == sorted(averages, key=lambda each: -float(str(each)))
    assert 0 < column(ordered, "model").index("m") < 15


def test_the_generalization_tables_bring_their_seen_tasks_and_averages() -> None:
    name = f"{B32}-generalization-1"
    ours = like_published("m", "ties", "Ties-Merging", name)
    table = report([ours], reference=name, reference_rows=True)
    assert columns(table)[-7:] == [
        "average", "average (seen)", "average (unseen)", "reference (seen)", "difference (seen)",
        "reference (unseen)", "difference (unseen)",
    ]  # fmt: skip
    assert table.rows[0][-4] == 0.689
    assert table.rows[0][-2] == 0.602
    published = table.rows[column(table, "model").index("Ties-Merging")]
    assert published[-6:-4] == (0.689, 0.602)
    assert any("its row `Pre-trained` disagrees with the main table" in line for line in table.warnings)


def test_the_robustness_tables_are_of_their_corruption() -> None:
    ours = result(
        "m", "task_arithmetic", **{"stanford-cars": 0.5, "eurosat": 0.5, "resisc45": 0.5, "gtsrb": 0.5}
    )
    table = report([ours], reference=f"{B32}-robustness-contrast")
    assert table.rows[0][-2:] == (0.66, pytest.approx(-0.16))
    assert any("split `test`, not `contrast`" in line for line in table.warnings)
    assert any("severity of its corruption is not published" in line for line in table.warnings)


def test_single_models_are_compared_with_the_row_of_their_task() -> None:
    tasks = dict.fromkeys(IMAGES, 0.5)
    table = report(
        [result("stanford-cars", **tasks), result("base", "pretrained", **tasks)],
        reference=f"individual-{TA8}",
    )
    assert column(table, "reference") == [0.471, 0.482]


def test_adamerging_is_layer_wise_unless_the_result_says_otherwise() -> None:
    tasks = dict.fromkeys(IMAGES, 0.5)
    layers = result("m", "ada_merging", **tasks)
    whole = replace(layers, checkpoint={**layers.checkpoint, "method.granularity": "task"})
    assert column(report([layers, whole], reference=TA8), "reference") == [0.826, 0.687]


def test_a_method_is_compared_with_a_row_that_there_is() -> None:
    from mergecli import methods
    from mergecli.results.published import _UNMERGED

    every = {row for name in names() for row in find(name).rows}
    published = [methods.find(each).published for each in methods.names()]
    rows = {each.format(granularity="Layer", lora_rank=32, density=1.0) for each in published} - {""}
    assert len(rows) == 25
    assert rows | set(_UNMERGED.values()) <= every


def of_pool(name: str, method: str, pool: str | None, tasks: int = 8, **settings: str) -> Evaluation:
    """A result on the first so many tasks."""
    every = catalogue.expand(("tall20",))[:tasks]
    own = result(name, method, **{task.replace("-", "_"): 0.5 for task in every})
    scores = dict(zip(every, own.tasks.values(), strict=True))
    about = {**own.checkpoint, **{f"method.{key}": value for key, value in settings.items()}}
    return replace(own, tasks=scores, recipe_pool=pool, checkpoint=about)


def test_an_average_is_held_against_the_row_of_the_same_method_and_settings_if_the_tasks_are_the_same() -> (
    None
):
    ours = [
        of_pool("a", "esm", "tsv", 14),
        of_pool("b", "esm_plus_plus", "tsv", 14, lora_rank="8"),
        of_pool("c", "ties", "tsv", 8),
    ]
    table = report(ours, reference="clip-vit-base-patch16-tsv-pool-14", reference_rows=True, intervals=True)
    assert column(table, "reference")[:3] == [0.876, 0.899, None]
    assert column(table, "difference")[:2] == [pytest.approx(0.5 - 0.876), pytest.approx(0.5 - 0.899)]
    (row,) = [each for each in table.rows if each[0] == "DC-Merge"]
    assert (row[1], row[2], column(table, "average")[table.rows.index(row)]) == ("published", None, 0.871)
    assert any(note.startswith("its source: kiddo127/ESM") for note in table.notes)
    assert not any("`DC-Merge` lacks" in each for each in table.warnings)


def test_a_result_of_unknown_models_is_said_to_be_one_beside_a_table_of_a_pool() -> None:
    table = report([of_pool("a", "esm", None)], reference="clip-vit-base-patch32-tsv-pool")
    assert any(
        "whether the models are those of `clip-vit-base-patch32-tsv-pool`" in each for each in table.warnings
    )


def test_settings_matter_only_where_the_table_has_the_method() -> None:
    other = of_pool("a", "tsv_m", "fusion_bench", scaling_factor="0.5")
    assert not any("scaling_factor" in each for each in report([other], reference=TA8).warnings)
    other = replace(other, recipe_pool="tsv")
    table = report([other], reference="clip-vit-base-patch32-tsv-pool")
    assert any("`scaling_factor` is 0.5, not 1.0" in each for each in table.warnings)
