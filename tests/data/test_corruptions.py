from __future__ import annotations

import json
import math
import subprocess
import sys
from hashlib import sha256
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image

from mergecli.data.corruptions import CONSTANTS, NAMES, SEVERITIES, check, corrupt
from mergecli.data.corruptions.edges import PIXEL, distances, edges
from mergecli.data.corruptions.effects import EFFECTS, motion_blur, streaked
from mergecli.data.corruptions.spatter import spatter, water
from mergecli.runtime.errors import UsageError

ALL = [(name, severity) for name in NAMES for severity in SEVERITIES]


def picture(seed: int = 0, side: int = 224) -> Image.Image:
    """Cloudy colors, of three octaves, the coarse ones stronger as in photographs; whole numbers throughout."""
    chance = np.random.Generator(np.random.PCG64(seed))
    total = np.zeros((side, side, 3), np.int64)
    for cells, weight in ((7, 4), (29, 2), (97, 1)):
        octave = Image.fromarray(chance.integers(0, 256, (cells, cells, 3), np.uint8))
        total += weight * np.asarray(octave.resize((side, side), Image.Resampling.BICUBIC), np.int64)
    return Image.fromarray((total // 7).astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def digest(pixels: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def gray(level: int = 128) -> Image.Image:
    return Image.new("RGB", (224, 224), (level,) * 3)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def constant(name: str, severity: int):
    return CONSTANTS[name][severity - 1]


def test_every_corruption_has_an_effect_and_a_constant_for_each_severity():
    assert set(EFFECTS) == set(NAMES) == set(CONSTANTS)
    assert all(len(constants) == len(SEVERITIES) == 5 for constants in CONSTANTS.values())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_shrinks_the_deviation_of_every_channel_by_the_factor_and_keeps_its_mean(severity):
    clean = array(picture())
    low = array(corrupt(picture(), "contrast", severity, ""))
    factor = constant("contrast", severity)
    mean = clean.mean(axis=(0, 1))
    cut = mean + factor * (clean - mean) - low
    assert cut.min() > -1e-9
    assert cut.max() < 1
    assert low.std(axis=(0, 1)) == pytest.approx(
        factor * clean.std(axis=(0, 1)), abs=0.5
    )  # of the cut fraction


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_is_normal_with_the_constant_as_deviation(severity):
    noisy = np.asarray(corrupt(gray(), "gaussian_noise", severity, ""))
    curve = NormalDist(128, 255 * constant("gaussian_noise", severity))
    for steps in (-1, -0.5, 0, 0.5, 1):
        level = round(curve.mean + steps * curve.stdev)
        expected = curve.cdf(level)
        error = math.sqrt(expected * (1 - expected) / noisy.size)
        assert (noisy < level).mean() == pytest.approx(expected, abs=4 * error)
    assert abs(np.corrcoef(noisy.reshape(-1, 3).T) - np.eye(3)).max() < 4 / 224


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_the_constant_share_half_black_half_white_each_channel_for_itself(severity):
    noisy = np.asarray(corrupt(gray(), "impulse_noise", severity, ""))
    share = constant("impulse_noise", severity)
    assert set(np.unique(noisy)) == {0, 128, 255}
    for level in (0, 255):
        error = math.sqrt(share / 2 / noisy.size)
        assert (noisy == level).mean() == pytest.approx(share / 2, abs=4 * error)
    every_channel = (noisy != 128).all(axis=2).mean()
    assert every_channel == pytest.approx(share**3, abs=4 * share**1.5 / 224 + 1e-9)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_compression_is_what_the_constant_quality_gives_and_no_other(severity, tmp_path):
    given = np.asarray(corrupt(picture(), "jpeg_compression", severity, ""))
    same: list[int] = []
    for quality in range(1, 40):
        picture().save(tmp_path / "stored.jpg", quality=quality)
        if np.array_equal(np.asarray(Image.open(tmp_path / "stored.jpg")), given):
            same.append(quality)
    assert same == [constant("jpeg_compression", severity)]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_leaves_blocks_as_many_as_the_constant_share_of_the_side(severity):
    blocks = array(corrupt(picture(), "pixelate", severity, ""))
    expected = int(224 * constant("pixelate", severity))
    assert 1 + (blocks[1:] != blocks[:-1]).any(axis=(1, 2)).sum() == expected
    assert 1 + (blocks[:, 1:] != blocks[:, :-1]).any(axis=(0, 2)).sum() == expected


def test_pixelate_at_severity_five_holds_the_means_of_squares_of_four():
    means = array(picture()).reshape(56, 4, 56, 4, 3).mean(axis=(1, 3))
    blocks = array(corrupt(picture(), "pixelate", 5, ""))[::4, ::4]
    assert abs(blocks - means).max() <= 1  # Pillow rounds twice, along the rows and along the columns


@pytest.mark.parametrize("degrees", [0, 30.1, -45, 44])
def test_motion_blur_draws_a_dot_into_half_a_normal_curve_along_the_angle_only(degrees):
    dot = np.zeros((101, 101, 3), np.uint8)
    dot[50, 50] = 255
    drawn = streaked(dot, 10, 3, degrees)[..., 0].astype(float)
    weights = [math.exp(-(i**2) / 18) for i in range(21)]
    expected = np.zeros((101, 101))
    for i, weight in enumerate(weights):
        down, across = (i * f(math.radians(degrees)) for f in (math.sin, math.cos))
        expected[50 - round(down), 50 - round(across)] += 255 * weight / sum(weights)
    cut = expected - drawn
    assert cut.min() > -1 / 256  # ImageMagick rounds to 16 bits before the fraction is cut
    assert cut.max() < 1


@pytest.mark.parametrize("degrees", [0, 30, -45])
def test_motion_blur_keeps_the_mean(degrees):
    framed = np.full((304, 304, 3), 128, np.uint8)
    framed[40:-40, 40:-40] = np.asarray(picture())
    lost = framed.astype(float) - streaked(framed, 20, 15, degrees)
    assert 0 <= lost.mean() < 0.5  # the fraction that is cut off
    flat = np.full((50, 60, 3), 77, np.uint8)
    assert np.array_equal(streaked(flat, 20, 15, degrees), flat)


def test_motion_blur_changes_nothing_along_stripes_and_much_across_them():
    along = np.broadcast_to((np.arange(224) % 8 < 4)[:, None, None] * np.uint8(200), (224, 224, 3))
    assert np.array_equal(streaked(along, 15, 8, 0), along)
    across = along.transpose(1, 0, 2)
    assert streaked(across, 15, 8, 0)[..., 50:170, :].std() < 0.15 * across.std()


def test_motion_blur_draws_angles_between_minus_and_plus_45_degrees():
    dot = np.zeros((101, 101, 3), np.uint8)
    dot[50, 50] = 255
    slopes = []
    for seed in range(40):
        rows, columns = np.nonzero(motion_blur(dot, (15, 12), generator(seed))[..., 0])
        assert columns.max() == 50
        slopes.append((50 - rows[np.argmin(columns)]) / (50 - columns.min()))
    assert min(slopes) < -0.8
    assert max(slopes) > 0.8
    assert max(map(abs, slopes)) <= 1


def test_spatter_covers_more_with_every_severity_first_of_water_then_of_mud():
    for liquid in ((1, 2, 3), (4, 5)):
        covered = [
            np.mean(
                [array(corrupt(gray(0), "spatter", severity, str(i))).any(axis=2).mean() for i in range(4)]
            )
            for severity in liquid
        ]
        assert covered == sorted(set(covered)), covered
        assert 0.002 < covered[0] < covered[-1] < 0.5


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_adds_pale_turquoise_up_to_the_opacity(severity):
    wet = array(corrupt(gray(0), "spatter", severity, ""))
    brightest = wet.max(axis=(0, 1))
    assert list(brightest) == [
        int(constant("spatter", severity)[4] * level + 1e-9) for level in (175, 238, 238)
    ]
    light = wet[..., 1] / 238
    assert abs(wet - light[..., None] * (175, 238, 238)).max() <= 1
    assert (array(corrupt(picture(), "spatter", severity, "")) >= array(picture())).all()


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_hides_what_is_behind_it(severity):
    dirty = np.asarray(corrupt(gray(255), "spatter", severity, ""))
    changed = dirty[(dirty != 255).any(axis=2)].astype(float)
    cover = (255 - changed[:, 0]) / (255 - 63)
    assert cover.min() >= 0.8
    assert list(dirty.min(axis=(0, 1))) == [63, 42, 20]


def test_an_image_that_no_drop_fell_on_stays_as_it_is():
    pixels = np.asarray(picture(side=28))
    for constants in ((0.1, 0.01, 2, 0.9, 0.6, 0), (0.1, 0.01, 1, 0.9, 1.5, 1)):
        assert np.array_equal(spatter(pixels, constants, generator()), pixels)


def test_the_distance_is_that_of_the_shortest_path_of_chamfer_steps():
    marks = generator(3).random((31, 40)) < 0.01
    assert 5 < marks.sum() < 20
    steps = {
        (y, x): {(0, 1): 1.0, (1, 1): 1.4, (1, 2): 2.1969}[min(abs(y), abs(x)), max(abs(y), abs(x))]
        for y in range(-2, 3) for x in range(-2, 3) if math.gcd(y, x) == 1
    }  # fmt: skip
    far = np.where(marks, 0, np.inf)
    for _ in range(40):
        wide = np.pad(far, 2, constant_values=np.inf)
        far = np.min(
            [far, *(wide[2 + y : 33 + y, 2 + x : 42 + x] + c for (y, x), c in steps.items())], axis=0
        )
    assert distances(marks, 9) / PIXEL == pytest.approx(np.minimum(far, 9), abs=1e-9)
    assert (distances(np.zeros((5, 6), bool), 20) == 20 * PIXEL).all()


def test_a_weak_edge_counts_only_where_it_is_joined_to_a_strong_one():
    weak = np.zeros((40, 40), np.uint8)
    weak[:, 20:] = 20  # a gradient of 80
    assert not edges(weak, 50, 150).any()
    weak[:6, 20:] = 60
    found = edges(weak, 50, 150)
    assert found[:, 19:21].any(axis=1).all()
    assert (found[10:].sum(axis=1) == 1).all()


def test_edges_distances_water_and_streaks_are_those_of_opencv_and_imagemagick():
    """The expected digests are of what OpenCV 5.0.0 and ImageMagick 6.9.11 made of the same picture."""
    levels = np.asarray(picture(5).convert("L"))
    found = edges(levels, 50, 150)
    assert (int(found.sum()), digest(found)) == (1966, "d22f1232dabb3639")
    assert digest(np.rint(distances(found, 20) / 10).astype(np.int32)) == "d7b0e387612d36e9"
    assert digest((255 * water(levels, 0.6) + 0.5).astype(np.uint8)) == "333ae8050c3ebe9e"
    assert digest(streaked(np.asarray(picture(5)), 15, 8, 33)) == "27a15e4c41e11d61"
    assert digest(streaked(np.asarray(picture(5)), 15, 8, -41)) == "c5b3b280bedfa442"


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_the_further_from_the_clean_one_the_higher_the_severity(name):
    error = [
        np.mean([((array(corrupt(picture(i), name, severity, str(i))) - array(picture(i))) ** 2).mean() for i in range(6)])
        for severity in SEVERITIES
    ]  # fmt: skip
    assert error == sorted(set(error)), error
    assert error[0] > 1


@pytest.mark.parametrize(("name", "severity"), ALL)
def test_size_and_mode_are_kept_whatever_they_are(name, severity):
    for image in (
        picture(),
        picture(side=28),
        picture().crop((0, 0, 50, 31)),
        picture(side=28).crop((0, 0, 1, 1)),
    ):
        given = corrupt(image, name, severity, "")
        assert (given.size, given.mode) == (image.size, "RGB")
    shades = picture(side=28).convert("L")
    same = corrupt(shades.convert("RGB"), name, severity, "")
    assert np.array_equal(np.asarray(corrupt(shades, name, severity, "")), np.asarray(same))


def test_the_image_given_is_left_alone():
    image = picture()
    for name, severity in ALL:
        corrupt(image, name, severity, "")
    assert np.array_equal(np.asarray(image), np.asarray(picture()))


PROCESS = """
import json, sys
from hashlib import sha256
from io import BytesIO
from PIL import Image
from mergecli.data.corruptions import corrupt
image = Image.open(BytesIO(sys.stdin.buffer.read()))
print(json.dumps({f"{n} {s} {t}": sha256(corrupt(image, n, s, t).tobytes()).hexdigest() for n, s, t in json.loads(sys.argv[1])}))
"""


def test_the_pixels_are_the_same_in_another_process_and_another_order(tmp_path):
    picture().save(tmp_path / "a.png")
    wanted = [(name, severity, text) for name, severity in ALL for text in ("eurosat test 7", "Zürich")]
    here = {f"{n} {s} {t}": sha256(corrupt(picture(), n, s, t).tobytes()).hexdigest() for n, s, t in wanted}
    there = subprocess.run(
        [sys.executable, "-c", PROCESS, json.dumps(wanted[::-1])],
        input=(tmp_path / "a.png").read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(there.stdout) == here
    chance = {
        name for name, severity, _ in wanted if len({here[f"{name} {severity} {t}"] for *_, t in wanted}) == 2
    }
    assert chance == set(NAMES) - {"contrast", "jpeg_compression", "pixelate"}


PIXELS = {
    "contrast": "c2d6ab911d0430c9",
    "gaussian_noise": "c8d48d79f5a45563",
    "impulse_noise": "0b3ce14942891681",
    "motion_blur": "2d988869138c6dc5",
    "pixelate": "cae04bc90156c6e5",
    "spatter": "4b431853dad7b7e2",
}


@pytest.mark.parametrize("name", PIXELS)
def test_the_pixels_are_the_same_on_every_machine(name):
    """All but those of JPEG, whose library may differ; to change them is to change results."""
    pixels = [np.asarray(corrupt(picture(), name, severity, "image 0")) for severity in SEVERITIES]
    assert digest(np.stack(pixels)) == PIXELS[name]


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("pixellate", 1, "unknown corruption `pixellate` (did you mean `pixelate`?)"),
        ("fog", 1, "unknown corruption `fog`"),
        ("contrast", 0, "corruption `contrast`: expected a severity from 1 to 5, got 0"),
        ("contrast", 6, "corruption `contrast`: expected a severity from 1 to 5, got 6"),
        ("contrast", 2.0, "corruption `contrast`: expected a severity from 1 to 5, got 2.0"),
        ("contrast", True, "corruption `contrast`: expected a severity from 1 to 5, got True"),
    ],
)
def test_what_there_is_not_is_refused(name, severity, message):
    for refused in (lambda: check(name, severity), lambda: corrupt(gray(), name, severity, "")):
        with pytest.raises(UsageError) as caught:
            refused()
        assert caught.value.message == message


def test_the_table_and_the_check_import_nothing_heavy():
    code = "import mergecli.data.corruptions as c, sys; c.check('spatter', 5); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {module.split(".")[0] for module in out.split()} & {"numpy", "PIL", "torch"} == set()
