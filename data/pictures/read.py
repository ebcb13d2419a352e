"""Read one image file: whatever it holds becomes (3, H, W) uint8 RGB, or an ImageError that says why not.

Size limits are checked on the header, before a pixel is decoded: a file of a few kilobytes can claim gigabytes. EXIF
orientation is ignored, as pycocotools and torchvision do: COCO annotations belong to the pixels as stored. Files are
opened read-only.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from permafrost.data.errors import DataError

MAX_PIXELS = 64_000_000
"""Largest image decoded: 8000 x 8000; the largest of COCO has 410,000 pixels."""
MAX_ASPECT = 100
"""Largest ratio of the sides: a strip of 1 x 65535 is no photograph, and vanishes when it is fitted into a square."""


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""These are tried on a file, whatever its name says. Left to itself PIL would hand PostScript, which is a program, to Ghostscript."""


class ImageError(ValueError):
    """One image file cannot be used. Training replaces it; evaluation and `check-data` report it."""


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Open an image file of one of FORMATS; its header alone is read.

    Raises:
        OSError: it is none, or cannot be read; and whatever else PIL's plug-ins raise on damaged files.
    """
    return Image.open(source, formats=FORMATS)


def size_problem(width: int, height: int) -> str | None:
    """Return why an image of this size is refused before decoding, or None."""
    if width < 1 or height < 1:
        return f"its size is {width} x {height}"
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels are over the limit of {MAX_PIXELS}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} is a strip: its sides differ more than {MAX_ASPECT} times"
    return None


def read_image(path: Path, expected_size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image file.

    Args:
        path: one of FORMATS. Grayscale, palette, CMYK and 16-bit pictures are converted; transparency is
            dropped.
        expected_size: (height, width) that the annotations were made for; None takes any.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        ImageError: missing, empty, truncated, not an image, too large, or of another size than expected.
    """
    try:
        if path.stat().st_size == 0:
            raise ImageError("the file is empty")
        with warnings.catch_warnings():
            # PIL warns of large headers and odd metadata; sizes have their own check below, and the pixels are all we
            # take.
            warnings.simplefilter("ignore")
            with open_image(path) as image:
                _check_header(image, expected_size)
                pixels = _rgb_pixels(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError) as error:
        # PIL's plug-ins raise all of these on damaged files.
        raise ImageError(_reason(error)) from error
    except Exception as error:
        # struct.error, zlib.error, DecompressionBombError and the like share no base class below Exception.
        raise ImageError(_reason(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_of(source: Any) -> Tensor:
    """Return a file, or a picture that a caller has at hand, as (3, H, W) uint8 RGB.

    Args:
        source: a path, or what `to_pixels` takes.

    Raises:
        DataError: it cannot be read, with the file's name; or it is no picture.
    """
    is_file = isinstance(source, (str, os.PathLike))
    try:
        return read_image(Path(source).expanduser()) if is_file else to_pixels(source)
    except ImageError as error:
        raise DataError(f"{source}: {error}" if is_file else str(error)) from error


def to_pixels(given: Any) -> Tensor:
    """Return a picture that a caller has at hand as (3, H, W) uint8 RGB.

    Args:
        given: a PIL image, an (H, W, 3) uint8 array in RGB, or a (3, H, W) uint8 tensor.

    Raises:
        ImageError: another type, shape or dtype; or too large, as of a file.
    """
    if isinstance(given, Image.Image):
        _check_header(given, None)
        return torch.from_numpy(_rgb_pixels(given)).permute(2, 0, 1).contiguous()
    if not isinstance(given, (np.ndarray, Tensor)):
        raise ImageError(
            f"its type is {type(given).__name__}: give a path, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor"
        )
    kind, layout = ("an array", "(H, W, 3)") if isinstance(given, np.ndarray) else ("a tensor", "(3, H, W)")
    shape, channels = tuple(given.shape), -1 if isinstance(given, np.ndarray) else 0
    if len(shape) != 3 or shape[channels] != 3:
        several = "; several images are given as a list" if len(shape) == 4 else ""
        raise ImageError(f"it has the shape {shape}: {kind} must be {layout}, RGB{several}")
    if given.dtype not in (np.uint8, torch.uint8):
        raise ImageError(f"its pixels are {given.dtype}: give uint8, 0 to 255")
    # An array is copied: torch warns of one that cannot be written to.
    pixels = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given)).permute(2, 0, 1)
    problem = size_problem(pixels.shape[-1], pixels.shape[-2])
    if problem:
        raise ImageError(problem)
    return pixels.contiguous()


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    if "cannot identify image file" in text:
        return f"it is not an image of a kind that is read ({', '.join(FORMATS)})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_header(image: Image.Image, expected_size: tuple[int, int] | None) -> None:
    """Refuse by size, read from the header, before any pixel is decoded."""
    problem = size_problem(image.width, image.height)
    if problem:
        raise ImageError(problem)
    if expected_size is None or (image.height, image.width) == tuple(expected_size):
        return
    height, width = expected_size
    hint = ""
    if (image.width, image.height) == (height, width):
        hint = " (turned by a quarter: annotations must belong to the stored pixels, EXIF orientation is ignored)"
    raise ImageError(f"the file is {image.width} x {image.height}, the annotations say {width} x {height}{hint}")


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels as RGB, (H, W, 3) uint8, writable."""
    if image.mode.startswith("I"):
        # 16-bit grayscale ("I;16", or "I" for some files): PIL's own conversion would clip at 255 instead of scaling.
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((gray + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range")
    return np.array(image.convert("RGB"))
