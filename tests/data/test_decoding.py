from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
from PIL import Image

from mergecli.data.decoding import (
    Block,
    Decoders,
    EncodedImage,
    ResizeAndCrop,
    Unreadable,
    decode_block,
    decoded,
    resized_and_cropped,
)
from tests.support.tiny_clip import tinted


def test_an_image_is_turned_as_its_exif_orientation_says():
    image, buffer = tinted(0, (1,)).crop((0, 0, 10, 20)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, "PNG", exif=exif)
    assert decoded(EncodedImage(buffer.getvalue())).size == (20, 10)


def test_a_worker_that_dies_is_replaced_by_this_process():
    framing = ResizeAndCrop(8, None, 3, (8, 8))
    image = io.BytesIO()
    tinted(0, (1,)).save(image, "PNG")
    block = Block([EncodedImage(image.getvalue())], framing, None, [""])
    with Decoders(2) as decoders:
        assert np.array_equal(decoders.submit(lambda: block).result(), decode_block(block))
        for child in decoders._children:
            child.kill()
            child.wait()
        assert np.array_equal(decoders.submit(lambda: block).result(), decode_block(block))


def test_a_worker_imports_no_torch():
    code = "import sys, mergecli.data.decoding; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_picture_is_unreadable():
    block = Block([EncodedImage(None)], ResizeAndCrop(8, None, 3, (8, 8)), None, [""])
    assert decode_block(block) == Unreadable(0, "there is none")


def test_a_transparent_color_of_a_palette_is_kept():
    """The processor of transformers 5 would make it white: see `resized_and_cropped`."""
    image, buffer = Image.new("P", (4, 4), 1), io.BytesIO()
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(buffer, "PNG", transparency=1)
    pixels = resized_and_cropped(decoded(EncodedImage(buffer.getvalue())), ResizeAndCrop(None, None, 3, None))
    assert {tuple(each) for each in pixels.reshape(3, -1).T.tolist()} == {(0, 255, 0)}


CHILDREN = """
import time
from mergecli.data.decoding import Block, Decoders, EncodedImage, ResizeAndCrop
with Decoders(2) as decoders:  # no `if __name__ == "__main__"`: a caller's script may lack it
    decoders.submit(lambda: Block([EncodedImage(None)], ResizeAndCrop(8, None, 3, (8, 8)), None, [""])).result()
    print(len(decoders._children), flush=True)
    time.sleep(60)
"""


def test_children_end_with_a_process_that_is_killed(tmp_path):
    """They hold its stderr open for as long as they live."""
    (tmp_path / "script.py").write_text(CHILDREN)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.kill()
    assert process.communicate(timeout=30) == ("", "")
