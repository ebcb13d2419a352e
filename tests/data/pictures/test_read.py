"""Whatever a file holds becomes RGB bytes or a reason."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from permafrost.data.detection.semantic import read_map
from permafrost.data.pictures.read import MAX_PIXELS, ImageError, read_image, size_problem
from permafrost.data.segmentation.labels import LabelError, read_labels

GRAY = (np.arange(12 * 10).reshape(12, 10) * 2).astype(np.uint8)


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG header of a size, with next to no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_rgb_is_read_as_stored(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (12, 10))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_modes_become_rgb(tmp_path, mode) -> None:
    source = Image.fromarray(GRAY).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.save(path)
    expected = np.asarray(source.convert("RGB"))
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)


def test_cmyk_jpeg_keeps_its_colours(tmp_path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "red.jpg").float().mean(dim=(1, 2)).tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_16_bit_gray_is_scaled_not_clipped(tmp_path) -> None:
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
    image = read_image(tmp_path / "deep.png")
    assert image.shape == (3, 12, 10)
    assert np.array_equal(image[1].numpy(), GRAY)


def test_exif_orientation_is_ignored(tmp_path) -> None:
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
def test_what_is_no_image_says_why(tmp_path, content, reason) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(path)
    assert path.read_bytes() == content


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch) -> None:
    (tmp_path / "bomb.png").write_bytes(_png_claiming(12_000, 12_000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("a pixel was decoded"))
    with pytest.raises(ImageError, match=f"over the limit of {MAX_PIXELS}"):
        read_image(tmp_path / "bomb.png")


def test_missing_files_and_folders(tmp_path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_damage_anywhere_is_an_image_error_or_an_image(tmp_path, suffix) -> None:
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


def test_size_limits() -> None:
    assert size_problem(8000, 8000) is None
    assert "limit" in size_problem(8001, 8000)
    assert size_problem(100, 1) is None
    assert "strip" in size_problem(101, 1)
    assert size_problem(0, 5) is not None


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n%%EOF\n"


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.eps"])
def test_postscript_is_not_handed_to_ghostscript(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name says: PIL by itself would run the program that the file is."""
    interpreter = tmp_path / "bin" / "gs"
    interpreter.parent.mkdir()
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path / 'it_ran'}\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{interpreter.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(ImageError, match="it is not an image of a kind that is read"):
        read_image(tmp_path / name)
    with pytest.raises(LabelError, match="the labels cannot be read"):
        read_labels(tmp_path / name, None, 150)
    with pytest.raises(ImageError, match="the semantic map cannot be read"):
        read_map(tmp_path / name, (64, 64), 183)
    assert not (tmp_path / "it_ran").exists()
    # The trap itself works.
    with contextlib.suppress(OSError, ValueError), Image.open(tmp_path / name) as image:
        image.load()
    assert (tmp_path / "it_ran").exists()


def test_every_image_is_opened_with_the_one_list_of_formats(root: Path) -> None:
    calls = [
        f"{file.relative_to(root)}: {line.strip()}"
        for folder in ("configs", "data", "heads", "launcher", "model", "permafrost")
        for file in (root / folder).rglob("*.py")
        for line in file.read_text().splitlines()
        if "Image.open(" in line
    ]
    assert calls == ["data/pictures/read.py: return Image.open(source, formats=FORMATS)"]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_format_of_the_list_is_read_under_any_name(kind: str, tmp_path: Path) -> None:
    pixels = np.full((40, 50, 3), (10, 200, 90), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg", kind)
    found = read_image(tmp_path / "picture.jpg").permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - pixels).max() <= (40 if kind == "GIF" else 6)
