"""Tables that name image files and their labels, and the columns that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergecli.data.images import Images, load_images
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from tests.data.test_images import parquet, png, task
from tests.data.test_inventory import count, put
from tests.support.tiny_clip import tinted

ROWS = [("0.png", "wren"), ("1.png", "robin"), ("2.png", "wren")]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path_factory.mktemp("home")))


def write(path: Path, rows: list[tuple[str, object]], image: str = "file_name", label: str = "label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    every = [{image: place, label: name} for place, name in rows]
    if path.suffix == ".parquet":
        parquet(path.parent, path.name, **{key: [row[key] for row in every] for key in (image, label)})
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in every))
    else:
        between = "\t" if path.suffix == ".tsv" else ","
        lines = [[image, label], *([str(place), str(name)] for place, name in rows)]
        path.write_text("\ufeff" + "".join(between.join(line) + "\r\n" for line in lines))
    return path


def order(images: Images) -> list[tuple[str, str]]:
    """The file and the class of each image."""
    labels = images.labels
    return [
        (Path(str(images.encoded(row).content)).name, images.names[labels[row]]) for row in range(len(images))
    ]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata_of_an_image_folder_says_the_labels(tmp_path: Path, name: str) -> None:
    put(tmp_path, "test/0.png", "test/1.png", "test/2.png", "train/0.png")
    write(tmp_path / name, [(f"test/{file}", label) for file, label in ROWS] + [("train/0.png", "robin")])
    images = load_images(task(tmp_path))
    assert order(images) == ROWS
    assert images.names == ("robin", "wren")
    assert order(load_images(task(tmp_path), "train")) == [("0.png", "robin")]
    assert order(load_images(task(tmp_path, classes=("Wren", "Robin")))) == [(f, n.title()) for f, n in ROWS]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_may_lie_in_the_folder_of_each_split(tmp_path: Path, name: str) -> None:
    put(tmp_path, "test/0.png", "test/1.png", "test/2.png", "train/0.png")
    write(tmp_path / "test" / name, list(ROWS))
    write(tmp_path / "train" / name, [("0.png", "robin")])
    assert order(load_images(task(tmp_path))) == ROWS
    assert len(load_images(task(tmp_path), "train")) == 1


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "test.csv", "test.jsonl"])
def test_a_plain_table_beside_a_folder_of_images_is_read(tmp_path: Path, name: str) -> None:
    put(tmp_path, "images/0.png", "images/1.png", "images/2.png")
    write(tmp_path / name, [(f"images/{file}", label) for file, label in ROWS], image="path")
    assert order(load_images(task(tmp_path))) == ROWS
    assert order(load_images(task(tmp_path / name))) == ROWS


def test_a_column_or_a_folder_says_the_split(tmp_path: Path) -> None:
    put(tmp_path, "images/0.png", "images/1.png")
    (tmp_path / "labels.csv").write_text(
        "image,label,split\nimages/0.png,robin,train\nimages/1.png,wren,test\n"
    )
    assert order(load_images(task(tmp_path))) == [("1.png", "wren")]
    with pytest.raises(UsageError, match="has no split `validation`"):
        load_images(task(tmp_path, train_split="no"), "validation")


def test_rows_that_do_not_say_their_split_while_others_do_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "test/0.png", "1.png")
    write(tmp_path / "metadata.csv", [("test/0.png", "robin"), ("1.png", "wren")])
    with pytest.raises(InputError, match=r"1 rows such as `1.png` do not say their split, the others do"):
        load_images(task(tmp_path))


def test_paths_are_relative_to_the_table_wherever_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = put(tmp_path / "d", "a.png") / "a.png"
    put(tmp_path, "other.png", "a.png")  # another image of that name, where the program runs
    for row in ("a.png", {"bytes": None, "path": "a.png"}):
        images = load_images(task(parquet(Path("d"), image=[row], label=[0]), classes=("a",)))
        assert images.encoded(0).content == str(Path("d/a.png"))
        assert images[0][0].size == (4, 4)
    before = images.fingerprint
    tinted(0, (1,)).save(file)
    assert load_images(task(Path("d"), classes=("a",))).fingerprint != before


def test_the_digest_of_a_table_is_of_images_and_labels_and_not_of_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two/three"):
        put(tmp_path / folder, "0.png", "1.png", "2.png")
        write(tmp_path / folder / "metadata.csv", list(ROWS))
    one, two = (load_images(task(tmp_path / folder)).fingerprint for folder in ("one", "two/three"))
    assert one == two
    write(
        tmp_path / "one" / "metadata.csv",
        [(file, "wren" if file == "1.png" else "robin") for file, _ in ROWS],
    )
    assert load_images(task(tmp_path / "one")).fingerprint != one


def test_images_that_a_table_does_not_name_are_left_out_with_a_warning(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "1.png", "2.png", "3.png", "more/4.png")
    write(tmp_path / "metadata.csv", list(ROWS))
    with pytest.warns(MergecliWarning, match="used 3 images in 2 classes .*; left out 2 files: 2 images"):
        load_images(task(tmp_path)).warn()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("0.png", "a"), ("5.png", "b"), ("6.png", "b")],
         "2 of 3 images that the table names are not there:\n  .*5.png\n  .*6.png"),
        ([("0.png", "a"), ("0.png", "b")], "metadata.csv, row 1: `0.png` stands there twice, with labels `a` and `b`"),
        ([("0.png", "")], "metadata.csv, row 0: column `label` is empty"),
        ([("", "a")], "metadata.csv, row 0: column `file_name` is empty"),
        ([("https://example.org/0.png", "a")], "1 of 1 images that the table names are not there"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_their_images_are_refused(
    tmp_path: Path, rows: list[tuple[str, object]], message: str
) -> None:
    put(tmp_path, "0.png")
    write(tmp_path / "metadata.csv", rows)
    with pytest.raises(InputError, match=message):
        load_images(task(tmp_path))


def test_a_table_without_the_columns_says_which_it_has(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    write(tmp_path / "birds.csv", [("0.png", "robin")], image="picture", label="species")
    with pytest.raises(InputError, match=r"birds.csv has no column `image`, `label`") as caught:
        load_images(task(tmp_path / "birds.csv"))
    assert caught.value.hint.startswith("it has `picture`, `species`; ")
    named = task(tmp_path, image_column="picture", label_column="species", given_columns=("image", "label"))
    assert count(load_images(named)) == {"robin": 1}


def test_whole_numbers_in_a_table_are_labels(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "1.png")
    write(tmp_path / "metadata.csv", [("0.png", "1"), ("1.png", "0")])
    assert load_images(task(tmp_path, classes=("robin", "wren"))).labels == [1, 0]
    with pytest.raises(InputError, match="has no class names of its own"):
        load_images(task(tmp_path))


def test_text_labels_are_class_names(tmp_path: Path) -> None:
    image = png(tinted(0, (1,)), tmp_path / "a.png")
    folder = parquet(tmp_path / "d", image=[image] * 3, label=["wren", "robin", "wren"])
    assert load_images(task(folder)).names == ("robin", "wren")
    images = load_images(task(folder, classes=("Wren", "Robin")))
    assert (images.names, images.labels) == (("Wren", "Robin"), [0, 1, 0])
    with pytest.raises(InputError, match="1 of 2 class names of the data are not the task's"):
        load_images(task(folder, classes=("wren", "crow")))


def test_a_text_label_of_another_split_is_a_class_too(tmp_path: Path) -> None:
    image = png(tinted(0, (1,)), tmp_path / "a.png")
    parquet(tmp_path / "d", "train.parquet", image=[image] * 3, label=["crow", "robin", "wren"])
    folder = parquet(tmp_path / "d", image=[image], label=["wren"])
    assert (load_images(task(folder)).names, load_images(task(folder)).labels) == (
        ("crow", "robin", "wren"),
        [2],
    )


@pytest.mark.parametrize("label", ["fine_label", "label"])
def test_the_column_that_the_recipe_names_is_the_only_one(tmp_path: Path, label: str) -> None:
    image = png(tinted(0, (1,)), tmp_path / "a.png")
    columns = {"img": [image] * 2, "label": [0, 0], "fine_label": [0, 1]}
    known = task(
        parquet(tmp_path / "d", **columns), image_column="img", label_column=label, given_columns=("image", "label"),
        classes=("a", "b"),
    )  # fmt: skip
    assert load_images(known).labels == ([0, 1] if label == "fine_label" else [0, 0])


def test_a_misspelled_column_does_not_fall_back_to_another(tmp_path: Path) -> None:
    image = png(tinted(0, (1,)), tmp_path / "a.png")
    folder = parquet(tmp_path / "d", image=[image], label=[0])
    with pytest.raises(InputError, match="has no column `fine_label`"):
        load_images(task(folder, label_column="fine_label", given_columns=("label",), classes=("a",)))
