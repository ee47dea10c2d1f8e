"""A data folder is looked at before it is counted: what is a class, what is a split, what is left out."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from mergecli.data.images import Images, load_images
from mergecli.runtime.errors import InputError, MergecliWarning
from tests.data.test_images import task

COLORS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path_factory.mktemp("home")))


def put(root: Path, *names: str, form: str = "PNG") -> Path:
    """The folder with an image at each place."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), COLORS[number % 3]).save(root / name, form)
    return root


def count(images: Images) -> dict[str, int]:
    return {name: images.labels.count(label) for label, name in enumerate(images.names)}


def test_folders_that_are_all_whole_numbers_go_by_number(tmp_path: Path) -> None:
    put(tmp_path, *(f"test/{number}/a.png" for number in range(12)))
    assert load_images(task(tmp_path)).names == tuple(map(str, range(12)))
    words = tuple(f"word {number}" for number in range(12))
    images = load_images(task(tmp_path, classes=words))
    assert images.names == words
    assert [Path(str(images.encoded(row).content)).parent.name for row in (2, 3)] == [
        "10",
        "11",
    ]  # as they are sorted
    assert images.labels[:4] == [0, 1, 10, 11]


@pytest.mark.parametrize(
    "place",
    [
        ".ipynb_checkpoints/a.png",
        "robin/.ipynb_checkpoints/a.png",
        ".cache/robin/a.png",
        "__MACOSX/robin/a.png",
        "robin/._a.png",
        "robin/__MACOSX/a.png",
        ".git/a/b/c.png",
    ],
)
def test_hidden_names_and_leftovers_of_archives_are_no_data(tmp_path: Path, place: str) -> None:
    for split in ("", "test/"):
        root = put(tmp_path / (split or "flat"), "robin/0.png", "wren/0.png", place)
        images = load_images(task(root if not split else tmp_path))
        assert (count(images), images.left_out) == ({"robin": 1, "wren": 1}, ())
        if not split:
            import shutil

            shutil.rmtree(root)


def test_what_pillow_reads_is_an_image_whatever_its_suffix(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/a.jfif", "test/robin/b", "test/robin/c.dat", "test/robin/d.txt", form="JPEG")
    put(tmp_path, "test/wren/a.PNG", "test/wren/b.tga", form="TGA")
    assert count(load_images(task(tmp_path))) == {"robin": 4, "wren": 2}


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png", "test/robin/1.png", "test/wren/0.png")
    for name in ("robin/a.svg", "robin/b.svg", "wren/notes", "wren/empty"):
        (tmp_path / "test" / name).write_text("<svg/>" if name != "wren/empty" else "")
    images = load_images(task(tmp_path))
    assert images.summary == (
        f"{tmp_path} (task `tints`): split `test`: used 3 images in 2 classes (the data's own names); "
        "left out 4 files: 2 .svg, 2 unreadable"
    )
    with pytest.warns(MergecliWarning, match="left out 4 files: 2 .svg, 2 unreadable"):
        images.warn()


def test_a_readme_beside_the_classes_is_no_reason_to_warn(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png", "test/wren/0.png")
    (tmp_path / "README.md").write_text("about")
    images = load_images(task(tmp_path))
    assert images.summary.endswith("left out 1 file: 1 .md")
    images.warn()


@pytest.mark.parametrize(
    "place",
    ["test/stray.png", "test/robin/more/0.png", "test/robin/a/b/c.png"],
    ids=["beside", "below", "deep"],
)
def test_images_beside_class_folders_and_below_them_are_left_out_with_a_warning(
    tmp_path: Path, place: str
) -> None:
    put(tmp_path, "test/robin/0.png", "test/wren/0.png", place)
    images = load_images(task(tmp_path))
    assert count(images) == {"robin": 1, "wren": 1}
    with pytest.warns(MergecliWarning, match=r"used 2 images in 2 classes .*; left out 1 file: 1 image"):
        images.warn()


def test_in_class_folders_without_splits_what_lies_deeper_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "robin/0.png", "wren/0.png", "robin/crops/0.png", "stray.png")
    images = load_images(task(tmp_path))
    assert (count(images), len(images.left_out)) == ({"robin": 1, "wren": 1}, 2)


def test_one_class_alone_is_warned_of(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png")
    with pytest.warns(MergecliWarning, match="there is one class alone, `robin`, and every answer is right"):
        load_images(task(tmp_path)).warn()


@pytest.mark.parametrize(
    ("folders", "kind"),
    [(("train", "test"), "splits"), (("images", "masks"), "parts"), (("test/images", "test/masks"), "parts"),
     (("robin", "images", "masks"), "parts"), (("Train", "Val"), "splits"), (("images",), "parts")],
)  # fmt: skip
def test_folders_that_are_named_like_splits_or_parts_are_no_classes(
    tmp_path: Path, folders: tuple[str, ...], kind: str
) -> None:
    put(tmp_path, *(f"{folder}/0.png" for folder in folders))
    with pytest.raises(InputError, match=f"which are names of {kind}.* and not of classes"):
        load_images(task(tmp_path))


def test_classes_that_the_recipe_names_may_be_called_so(tmp_path: Path) -> None:
    put(tmp_path, "test/images/0.png", "test/masks/0.png")
    assert count(load_images(task(tmp_path, classes=("masks", "images")))) == {"masks": 1, "images": 1}


def test_one_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "test/train/0.png", "test/bus/0.png", "test/car/0.png")
    assert count(load_images(task(tmp_path))) == {"bus": 1, "car": 1, "train": 1}


@pytest.mark.parametrize(("one", "other"), [("Robin", "robin"), ("é", unicodedata.normalize("NFD", "é"))])
def test_class_folders_that_are_one_name_are_refused_where_the_task_has_it_once(
    tmp_path: Path, one: str, other: str
) -> None:
    put(tmp_path, f"test/{one}/0.png", f"test/{other}/0.png", "test/wren/0.png")
    with pytest.raises(InputError, match="differ only in case, spaces, `_` or `-`"):
        load_images(task(tmp_path, classes=(one.upper(), "wren")))
    joined = load_images(
        task(tmp_path, classes=("a", "w"), mapping=((one, "a"), (other, "a"), ("wren", "w")))
    )
    assert count(joined) == {"a": 2, "w": 1}


def test_a_folder_in_another_unicode_form_is_the_same_name(tmp_path: Path) -> None:
    put(tmp_path, f"test/{unicodedata.normalize('NFD', 'Fünf')}/0.png", "test/wren/0.png")
    assert count(load_images(task(tmp_path, classes=("wren", "fünf")))) == {"wren": 1, "fünf": 1}


@pytest.mark.parametrize(
    "names", [("validation", "val"), ("valid", "validation"), ("test", "Test"), ("testing", "test")]
)
def test_two_spellings_of_one_split_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{name}/{bird}/0.png" for name in (*names, "train") for bird in ("robin", "wren")))
    wanted = "test" if "test" in names else "validation"
    with pytest.raises(InputError, match=f"has split `{wanted}` under 2 names: `"):
        load_images(task(tmp_path), wanted)
    assert len(load_images(task(tmp_path), "train")) == 2


def test_images_without_class_folders_and_deeper_ones_are_said(tmp_path: Path) -> None:
    put(tmp_path / "flat", "0.png", "1.png")
    with pytest.raises(InputError, match="2 images lie in it without a folder for each class"):
        load_images(task(tmp_path / "flat"))
    put(tmp_path / "deep", "data/test/robin/0.png")
    with pytest.raises(InputError, match=r"1 images lie deeper, such as `data/test/robin/0.png`"):
        load_images(task(tmp_path / "deep"))


def test_links_to_class_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    put(tmp_path / "store", "a/0.png", "b/0.png", "b/1.png")
    (tmp_path / "data" / "test").mkdir(parents=True)
    for name, target in (("robin", "a"), ("wren", "b")):
        (tmp_path / "data" / "test" / name).symlink_to(tmp_path / "store" / target)
    (tmp_path / "store" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "store" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    images = load_images(task(tmp_path / "data"))
    assert count(images) == {"robin": 1, "wren": 2}
    assert [each.what for each in images.left_out if each.path == "test/robin/gone.png"] == ["unreadable"]


def test_a_pipe_among_the_images_is_left_out_and_not_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png", "test/wren/0.png")
    os.mkfifo(tmp_path / "test/robin/pipe.png")
    images = load_images(task(tmp_path))
    assert images.summary.endswith("left out 1 file: 1 unreadable")


def test_an_empty_image_file_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png", "test/wren/0.png")
    (tmp_path / "test/robin/1.png").write_bytes(b"")
    images = load_images(task(tmp_path))
    assert len(images) == 3
    with pytest.raises(
        InputError, match="image 1: cannot be read: it is no image of a kind that Pillow knows"
    ):
        images[1]


def test_the_digest_of_a_folder_stays_what_it_was(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png", "test/wren/0.png")
    assert (
        load_images(task(tmp_path)).fingerprint
        == load_images(task(tmp_path, classes=("wren", "robin"))).fingerprint
    )
    before = load_images(task(tmp_path)).fingerprint
    put(tmp_path, "test/.hidden/0.png")
    (tmp_path / "test/robin/a.svg").write_text("<svg/>")
    assert load_images(task(tmp_path)).fingerprint == before
