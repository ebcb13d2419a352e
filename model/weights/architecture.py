"""Tell a network's architecture from the shapes of its weights alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES, SWIN_V1_SIZES, SWINV2_SIZES


@dataclass(frozen=True)
class Architecture:
    """A Swin in numbers.

    Attributes:
        version: 1 or 2.
        embed_dim: channels of the first stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        extra_norm_interval: blocks between extra norms on the main branch; 0: none.
        num_classes: of its classifier; None without one.
        name: the name it goes by; None if it has none.
    """

    version: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    extra_norm_interval: int
    num_classes: int | None
    name: str | None

    def describe(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def infer_architecture(shapes: Mapping[str, tuple[int, ...]], *, source: str) -> Architecture:
    """Read the architecture off the shapes of a state dict with official names.

    A V1 block has a table of position biases ((2 * window - 1) ** 2, heads), a V2 block a logit scale (heads, 1, 1).

    Raises:
        WeightsError: if these are not the weights of a Swin, or some are missing.
    """
    depths = [0] * NUM_STAGES
    heads: dict[int, dict[int, int]] = {1: {}, 2: {}}
    extra_norms = []
    for name, shape in shapes.items():
        match = re.match(r"layers\.([0-3])\.blocks\.(\d+)\.(.+)", name)
        if match is None:
            continue
        stage, block, rest = int(match[1]), int(match[2]), match[3]
        depths[stage] = max(depths[stage], block + 1)
        if rest == "attn.relative_position_bias_table":
            heads[1][stage] = shape[-1]
        elif rest == "attn.logit_scale":
            heads[2][stage] = shape[0]
        elif rest == "enorm.weight":
            extra_norms.append(block + 1)
    versions = [version for version, found in heads.items() if len(found) == NUM_STAGES]
    embedding = shapes.get("patch_embed.proj.weight")
    if embedding is None or len(versions) != 1:
        raise WeightsError(
            f"{source} holds no complete Swin: expected patch_embed.proj.weight and, in every block of layers.0 to "
            f"layers.3, attn.logit_scale (V2) or attn.relative_position_bias_table (V1); its names start like "
            f"{', '.join(sorted(shapes)[:3])}."
        )
    version = versions[0]
    num_heads = tuple(heads[version][stage] for stage in range(NUM_STAGES))
    classifier = shapes.get("head.weight")
    found = (embedding[0], tuple(depths), num_heads)
    sizes = SWIN_V1_SIZES if version == 1 else SWINV2_SIZES
    names = [name for name, size in sizes.items() if (size.embed_dim, size.depths, size.num_heads) == found]
    return Architecture(
        version=version,
        embed_dim=embedding[0],
        depths=tuple(depths),
        num_heads=num_heads,
        extra_norm_interval=min(extra_norms, default=0),
        num_classes=None if classifier is None else classifier[0],
        name=names[0] if names else None,
    )
