"""List the public weights that are downloaded by name: what they are and where they lie. Imports no torch.

Names are the released files' names, without `.pth`. Sources: the model hub page of microsoft/Swin-Transformer for the
files, their windows and resolutions; its configurations for SimMIM (pretraining at 192 pixels with window 12,
fine-tuning at 224 with window 14 and pretrained windows 12, 12, 12, 6). No checksums are published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from permafrost.model.spec import NUM_STAGES, PATCH_SIZE

_RELEASES = "https://github.com/SwinTransformer/storage/releases/download"
_SIMMIM = "https://huggingface.co/zdaxie/SimMIM/resolve/main"


@dataclass(frozen=True)
class PublicWeights:
    """A released file.

    Attributes:
        backbone: the base network it belongs to.
        url: where it is.
        image_size: side of its training images in pixels.
        window: its configured window.
        pretrained_window_size: the window that scales the position bias's coordinates, per stage; None for Swin V1,
            which has no such coordinates.
        sha256: its checksum, where one is published.
    """

    backbone: str
    url: str
    image_size: int
    window: int
    pretrained_window_size: tuple[int, ...] | None
    sha256: str | None = None

    @property
    def file(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[1]

    @property
    def window_size(self) -> tuple[int, ...]:
        """The window each stage had: no larger than its map."""
        return windows_on(self.image_size, self.window)


def windows_on(image_size: int, window: int) -> tuple[int, ...]:
    """Return the window of each stage in training on images of `image_size` pixels: the whole map where that is smaller."""
    return tuple(min(window, image_size // (PATCH_SIZE * 2**stage)) for stage in range(NUM_STAGES))


def find_public(name: object) -> PublicWeights | None:
    """Return the public weights of this name; the released file's name is one too."""
    return PUBLIC_WEIGHTS.get(str(name).removesuffix(".pth"))


def _v1() -> Iterator[PublicWeights]:
    files = {
        "v1.0.0": (
            "tiny_patch4_window7_224",
            "small_patch4_window7_224",
            "base_patch4_window7_224",
            "base_patch4_window12_384",
            "base_patch4_window7_224_22k",
            "base_patch4_window12_384_22k",
            "base_patch4_window7_224_22kto1k",
            "base_patch4_window12_384_22kto1k",
            "large_patch4_window7_224_22k",
            "large_patch4_window12_384_22k",
            "large_patch4_window7_224_22kto1k",
            "large_patch4_window12_384_22kto1k",
        ),
        "v1.0.8": (
            "tiny_patch4_window7_224_22k",
            "small_patch4_window7_224_22k",
            "tiny_patch4_window7_224_22kto1k_finetune",
            "small_patch4_window7_224_22kto1k_finetune",
        ),
    }
    for release, names in files.items():
        for name in names:
            size, _, window, image_size = name.split("_")[:4]
            url = f"{_RELEASES}/{release}/swin_{name}.pth"
            yield PublicWeights(f"swin_{size}", url, int(image_size), int(window.removeprefix("window")), None)


def _v2() -> Iterator[PublicWeights]:
    for size in ("tiny", "small", "base"):
        for window in (8, 16):
            url = f"{_RELEASES}/v2.0.0/swinv2_{size}_patch4_window{window}_256.pth"
            yield PublicWeights(f"swinv2_{size}", url, 256, window, windows_on(256, window))
    trained = windows_on(192, 12)
    for size in ("base", "large"):
        start = f"{_RELEASES}/v2.0.0/swinv2_{size}_patch4_window12"
        yield PublicWeights(f"swinv2_{size}", f"{start}_192_22k.pth", 192, 12, trained)
        for window, image_size in ((16, 256), (24, 384)):
            url = f"{start}to{window}_192to{image_size}_22kto1k_ft.pth"
            yield PublicWeights(f"swinv2_{size}", url, image_size, window, trained)


def _simmim() -> Iterator[PublicWeights]:
    data = {
        "small": ("1kper10", "1kper20", "1kper50", "1k"),
        "base": ("1kper10", "1kper20", "1kper50", "1k", "22k"),
        "large": ("1kper10", "1kper20", "1kper50", "1k", "22k"),
        "huge": ("1kper20", "1kper50", "1k", "22k"),
        "giant": ("1kper50", "1k", "22k"),
    }
    trained = windows_on(192, 12)
    for size, sets in data.items():
        backbone = "swinv2_giant_1b" if size == "giant" else f"swinv2_{size}"
        for name in (f"swinv2_{size}_{part}_{steps}" for part in sets for steps in ("125k", "250k", "500k")):
            url = f"{_SIMMIM}/simmim_swinv2_pretrain_models/{name}.pth"
            yield PublicWeights(backbone, url, 192, 12, trained)
            url = f"{_SIMMIM}/simmim_swinv2_finetune_models/finetune_{name}.pth"
            yield PublicWeights(backbone, url, 224, 14, trained)


PUBLIC_WEIGHTS: dict[str, PublicWeights] = {
    known.file.removesuffix(".pth"): known for known in (*_v1(), *_v2(), *_simmim())
}
