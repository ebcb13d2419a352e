"""Whatever a file holds becomes RGB bytes or a reason."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.data.pictures.read import MAX_PIXELS, ImageError, read_image, size_problem

GRAY = (np.arange(12 * 10).reshape(12, 10) * 2).astype(np.uint8)


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG header of a size, with next to no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_rgb_is_read_as_stored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (12, 10))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_modes_become_rgb(tmp_path, mode):
    source = Image.fromarray(GRAY).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.save(path)
    expected = np.asarray(source.convert("RGB"))
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "red.jpg").float().mean(dim=(1, 2)).tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
    image = read_image(tmp_path / "deep.png")
    assert image.shape == (3, 12, 10)
    assert np.array_equal(image[1].numpy(), GRAY)


def test_exif_orientation_is_ignored(tmp_path):
    image = Image.fromarray(np.dstack([GRAY] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    plain = tmp_path / "plain.jpg"
    image.save(plain, quality=100)
    assert torch.equal(read_image(tmp_path / "turned.jpg", (12, 10)), read_image(plain))
    with pytest.raises(ImageError, match="EXIF orientation is ignored"):
        read_image(tmp_path / "turned.jpg", (10, 12))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html><body>404</body></html>", "not an image"),
        (_png_claiming(9_000, 9_000), "over the limit"),
        (_png_claiming(50_000, 50_000), "limit"),
        (_png_claiming(1, 65_535), "strip"),
        (_png_claiming(20, 20), "OSError"),
        (b"\x89PNG\r\n\x1a\n", "not an image|Error"),
    ],
)
def test_what_is_no_image_says_why(tmp_path, content, reason):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(path)
    assert path.read_bytes() == content


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(_png_claiming(12_000, 12_000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("a pixel was decoded"))
    with pytest.raises(ImageError, match=f"over the limit of {MAX_PIXELS}"):
        read_image(tmp_path / "bomb.png")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_damage_anywhere_is_an_image_error_or_an_image(tmp_path, suffix):
    """Truncated at many places, and with bytes overwritten: never another exception, never another shape."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(4)
    refused = 0
    for trial in range(60):
        if trial % 2:
            damaged = whole[: rng.integers(0, len(whole))]
        else:
            damaged = bytearray(whole)
            for _ in range(4):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert read_image(path, (40, 30)).shape == (3, 40, 30)
        except ImageError:
            refused += 1
    assert refused > 15


def test_size_limits():
    assert size_problem(8000, 8000) is None
    assert "limit" in size_problem(8001, 8000)
    assert size_problem(100, 1) is None
    assert "strip" in size_problem(101, 1)
    assert size_problem(0, 5) is not None
