"""Pixels: CIFAR's batches, and the one door to those of a file."""

import io
import pickle
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.data import images, tracking
from common.data.picture import Unreadable, read_picture
from common.data.tiny.digits import digits
from common.run import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# CIFAR ------------------------------------------------------------------------------------------------------


def test_images_beside_an_entry_meta_are_no_cifar(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "train/a/1.png")
    (tmp_path / "meta").write_text("notes")
    assert type(images.open_images(tmp_path, "train")) is images.ImageFolder
    (tmp_path / "meta").unlink()
    (tmp_path / "batches.meta").mkdir()
    assert type(images.open_images(tmp_path, "train")) is images.ImageFolder


def test_cifar_pickles_run_no_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return print, ("pwned",)

    root = digits("cifar", tmp_path / "c")
    (root / "test_batch").write_bytes(pickle.dumps({"data": Malice(), "labels": []}))
    with pytest.raises(UserError, match="refused"):
        images.open_images(root, "val")


def _pickled(pixels, labels):
    """As Python 2 wrote them: texts are bytes."""
    return pickle.dumps({"data": pixels, "labels": labels}, protocol=2)


def test_cifar_as_python_2_wrote_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    python2 = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T" + (9216).to_bytes(4, "little") + pixels.tobytes()
        + b"tbU\x06labels]q\x08(K\x01K\x00K\x01eu."
    )
    assert np.array_equal(pickle.loads(python2, encoding="latin1")["data"], pixels)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}, protocol=2))
    for name, content in (("data_batch_1", python2), ("test_batch", _pickled(pixels, [1, 0, 1]))):
        (tmp_path / name).write_bytes(content)
    for split in ("train", "val"):
        data = images.open_images(tmp_path, split)
        assert data.labels.tolist() == [1, 0, 1] and data.classes == ["cat", "dog"]
        assert np.array_equal(np.stack([np.asarray(data[i][0]) for i in range(3)]).transpose(0, 3, 1, 2).reshape(3, -1),
                              pixels)


def _object_array():
    """Bytes of the file as an array of objects: addresses."""
    return (b"\x80\x02}(U\x04datacnumpy\nndarray\nK\x02\x85cnumpy\ndtype\nU\x01O\x85RU\x10" + b"A" * 16
            + b"\x87RU\x06labels](K\x00K\x00eu.")


HOSTILE = {
    "objects out of bytes": _object_array(),
    "a type with objects hidden in it": b"\x80\x02cnumpy\ndtype\nU\x02V8\x85R(K\x03U\x01|NNNK\x08K\x01K\x00tb.",
    "16 GiB": b"\x80\x02cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x04\x85\x85R.",
    "a memo of 2**31": b"\x80\x02K\x00r\xff\xff\xff\x7f.",
    "a string of 2**40 bytes": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
    "a list": pickle.dumps([1, 2]),
    "a shape that the bytes have not": _pickled(np.zeros((1, 3072), np.uint8), [0, 0]),
    "another type": _pickled(np.zeros((1, 3072), np.float32), [0]),
    "label 10 of 10 names": _pickled(np.zeros((1, 3072), np.uint8), [10]),
    "a negative label": _pickled(np.zeros((1, 3072), np.uint8), [-1]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_cifar_batch_is_refused(tmp_path, content):
    root = digits("cifar", tmp_path / "c")
    whole = (root / "test_batch").read_bytes()
    for name in ("test_batch", "batches.meta"):
        (root / "test_batch").write_bytes(whole)
        (root / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is (truncated or no CIFAR batch|refused|no CIFAR meta file)"):
            images.open_images(root, "val")


@given(st.data())
def test_a_damaged_cifar_batch_is_one_error(cifar_root, data):
    whole = bytearray(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, protocol=2))
    place = data.draw(st.one_of(st.integers(0, 160), st.integers(len(whole) - 40, len(whole) - 1)))
    whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (cifar_root / "test_batch").write_bytes(whole)
    with suppress(UserError):
        images.open_images(cifar_root, "val")


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    return digits("cifar", tmp_path_factory.mktemp("damaged") / "c")


# Pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, mode", [("png", "I;16"), ("ppm", "I")])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, mode):
    values = np.linspace(0, 65535, 300).round().astype(np.uint16).reshape(15, 20)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        Image.fromarray(values).save(path)
    else:
        path.write_bytes(b"P5 20 15 65535\n" + values.astype(">u2").tobytes())
    with Image.open(path) as image:
        assert image.mode == mode
    pixels = np.asarray(read_picture(path))
    assert pixels.shape == (15, 20, 3) and np.array_equal(pixels[..., 0], np.round(values / 257).astype(np.uint8))
    assert np.array_equal(tracking.read_frame(path), pixels)


def test_floating_point_pixels_are_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"Pf 2 2 -1.0\n" + np.ones(4, "<f4").tobytes())
    with pytest.raises(Unreadable, match="floating-point"):
        read_picture(tmp_path / "a.ppm")


def test_transparency_palettes_cmyk_and_exif_are_as_pillow_converts_them(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "alpha.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (4, 8), "red").save(tmp_path / "turned.jpg", exif=exif)
    first, second = Image.new("RGB", (4, 4), "lime"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "moving.jpg", "GIF", save_all=True, append_images=[second])
    assert read_picture(tmp_path / "alpha.png").getpixel((0, 0)) == (10, 20, 30)
    assert read_picture(tmp_path / "palette.png").getpixel((0, 0)) == (40, 50, 60)
    assert read_picture(tmp_path / "cmyk.jpg").getpixel((0, 0)) == (0, 255, 255)
    assert read_picture(tmp_path / "turned.jpg").size == (4, 8)
    assert read_picture(tmp_path / "moving.jpg").getpixel((0, 0)) == (0, 255, 0)


def _header(width, height):
    """A PNG that says it is that large."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("content, expected", [
    (_header(14000, 14000), "decompression bomb"), (_header(1, 5_000_000), "1 x 5000000 px; its sides"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n", "cannot identify"), (b"", "cannot identify"),
])
def test_a_hostile_picture_is_unreadable(tmp_path, content, expected):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Unreadable, match=expected):
        read_picture(tmp_path / "a.png")
    with pytest.raises(OSError, match=rf"cannot read .*a\.png.*{expected}"):
        tracking.read_frame(tmp_path / "a.png")
