"""Describe a base network in numbers: the shape of its feature maps and the table of sizes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from permafrost._nearest import nearest
from permafrost.model.errors import BackboneError

NUM_STAGES = 4
PATCH_SIZE = 4
TIMM_PREFIX = "timm/"


@dataclass(frozen=True)
class FeatureSpec:
    """Channels and strides of the feature maps a head receives, finest first.

    Map i of an image (H, W) has shape (channels[i], ceil(H / strides[i]), ceil(W / strides[i])).

    Attributes:
        channels: channels of each map.
        strides: input pixels per step of each map, strictly increasing.

    Raises:
        BackboneError: if the two differ in length, are empty, hold a value below 1, or the strides do not increase.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("channels", "strides"):
            values = getattr(self, field)
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
                raise BackboneError(f"FeatureSpec.{field} must be a tuple of integers, found {values!r}.")
            if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
                raise BackboneError(f"FeatureSpec.{field} must hold integers of at least 1, found {values!r}.")
            object.__setattr__(self, field, tuple(values))
        if not self.channels or len(self.channels) != len(self.strides):
            raise BackboneError(
                f"FeatureSpec needs one stride per level: found {len(self.channels)} channels {self.channels} "
                f"and {len(self.strides)} strides {self.strides}."
            )
        if any(fine >= coarse for fine, coarse in zip(self.strides, self.strides[1:], strict=False)):
            raise BackboneError(f"FeatureSpec.strides must increase from level to level, found {self.strides}.")

    @property
    def num_levels(self) -> int:
        """Number of feature maps."""
        return len(self.channels)


@dataclass(frozen=True)
class SwinSize:
    """A row of the tables of Swin sizes: the fields they have in common.

    Attributes:
        embed_dim: channels of the first stage; each later stage doubles them.
        depths: blocks of each stage.
        num_heads: attention heads of each stage (32 channels per head throughout).
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's feature map."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def spec(self) -> FeatureSpec:
        """The feature maps this size gives to a head."""
        return FeatureSpec(self.channels, tuple(PATCH_SIZE * 2**stage for stage in range(len(self.depths))))


@dataclass(frozen=True)
class SwinV1Size(SwinSize):
    """One row of the table of Swin V1 sizes.

    Attributes:
        window_size: window of a model that is built without weights which know better.
    """

    window_size: int = 7


@dataclass(frozen=True)
class SwinV2Size(SwinSize):
    """One row of the table of SwinV2 sizes.

    Attributes:
        extra_norm_interval: a LayerNorm on the main branch after every so many blocks, counted within a stage; 0: none.
        window_size: window of a model that is built without weights which know better.
    """

    extra_norm_interval: int = 0
    window_size: int = 8


# Section 3.3 of "Swin Transformer" (Liu et al., ICCV 2021).
SWIN_V1_SIZES: dict[str, SwinV1Size] = {
    "swin_tiny": SwinV1Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": SwinV1Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": SwinV1Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": SwinV1Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}

# Widths and depths of "Swin Transformer V2" (Liu et al., CVPR 2022), tables of sections 3.4 and 4.1; its huge and giant
# models carry the extra norm every 6 blocks. giant_1b is the 1.06 B model released with SimMIM, whose width follows
# from its published parameter count. nano is this project's own.
SWINV2_SIZES: dict[str, SwinV2Size] = {
    "swinv2_nano": SwinV2Size(32, (2, 2, 4, 2), (1, 2, 4, 8)),
    "swinv2_tiny": SwinV2Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swinv2_small": SwinV2Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swinv2_base": SwinV2Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swinv2_large": SwinV2Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swinv2_huge": SwinV2Size(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_interval=6),
    "swinv2_giant_1b": SwinV2Size(448, (2, 2, 18, 2), (14, 28, 56, 112)),
    "swinv2_giant": SwinV2Size(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_interval=6),
}


def per_stage(value: int | Sequence[int], *, field: str) -> tuple[int, ...]:
    """Spread one number over the stages, or check that there is one per stage.

    Args:
        value: one integer of at least 1, or four of them.
        field: name of the field, for the error.

    Raises:
        BackboneError: if it is neither.
    """
    values = (value,) * NUM_STAGES if isinstance(value, int) else value
    valid = isinstance(values, Sequence) and not isinstance(values, (str, bytes)) and len(values) == NUM_STAGES
    if not valid or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in values):
        raise BackboneError(
            f"{field} must be one integer of at least 1 or {NUM_STAGES} of them, one per stage; found {value!r}."
        )
    return tuple(values)


def check_name(name: str) -> None:
    """Check that a base network of this name can be built.

    Of a timm/ name only the form is checked: whether timm knows it shows when it is loaded, since asking imports torch.

    Raises:
        BackboneError: if not, with the nearest name that can.
    """
    names = (*SWINV2_SIZES, *SWIN_V1_SIZES)
    if name in names:
        return
    known = f"{', '.join(names)} and {TIMM_PREFIX}MODEL"
    if not isinstance(name, str):
        raise BackboneError(f"A backbone is called by its name, found {name!r}; the names are {known}.")
    if name.startswith(TIMM_PREFIX):
        if re.fullmatch(r"[\w-]+(\.[\w-]+)*", name.removeprefix(TIMM_PREFIX)):
            return
        raise BackboneError(
            f"{name!r} is no name of a timm model: give one as timm lists them, with or without the tag of its weights, "
            f"like '{TIMM_PREFIX}vit_small_patch14_dinov2.lvd142m'."
        )
    close = nearest(name, names, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise BackboneError(f"There is no backbone called {name!r}; the names are {known}.{hint}")
