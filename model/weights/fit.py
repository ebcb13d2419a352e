"""Whether a weights file belongs to a network, with a readable report where it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES, SWIN_V1_SIZES, SWINV2_SIZES
from permafrost.model.swin.parts import Swin
from permafrost.model.swin.v2 import SwinV2Classifier
from permafrost.model.weights.formats import listed

if TYPE_CHECKING:
    from permafrost.model.weights.read import Checkpoint


def check_fit(network: Swin, name: str, checkpoint: Checkpoint) -> None:
    """Checks that a file holds exactly the tensors of a network.

    Args:
        network: The network, on any device.
        name: Its name.
        checkpoint: The file. Final norm and classifier are allowed, and passed over, in a network without them.

    Raises:
        WeightsError: If a tensor is missing, unexpected or of another shape, listing which.
    """
    stated = checkpoint.metadata.get("name")
    if stated is not None and stated != name:
        raise WeightsError(f"{checkpoint.source} holds weights of {stated!r}, but the recipe asks for {name!r}.")
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    classifier = isinstance(network, SwinV2Classifier)
    tensors = checkpoint.tensors if classifier else checkpoint.backbone_tensors()
    found = tensors.shapes
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key] != found[key]
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"{checkpoint.source} does not fit {name}:"]
    for what, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if entries:
            lines.append(f"  {len(entries)} {what}: {listed(entries)}")
    hint = _hint(found, expected, missing, unexpected, shapes)
    raise WeightsError("\n".join(lines + ([f"  {hint}"] if hint else [])))


def _hint(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    """Says what a file that does not fit looks like, where that can be told."""
    if missing and not expected.keys() & found.keys():
        for key in found:
            prefix = key.removesuffix("patch_embed.proj.weight")
            if prefix and prefix != key:
                return f"Its names start with {prefix!r}: give prefix={prefix!r}."
    has_tables, needs_tables = (
        any(key.endswith("relative_position_bias_table") for key in keys) for keys in (found, expected)
    )
    if has_tables and not needs_tables:
        return "It is a Swin V1 checkpoint."
    if needs_tables and any(".cpb_mlp." in key for key in found):
        return "It is a SwinV2 checkpoint."
    if not shapes and all(".enorm." in key for key in missing + unexpected):
        blocks = sorted({tuple(map(int, re.findall(r"\d+", key)[:2])) for key in found if ".enorm." in key})
        interval = blocks[0][1] + 1 if blocks else 0
        return f"Only extra norms differ: give extra_norm_interval={interval} if the weights are meant to be like this."
    depths = [0] * NUM_STAGES
    for key in found:
        if match := re.match(r"layers\.([0-3])\.blocks\.(\d+)\.", key):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    width = found.get("patch_embed.proj.weight", (0,))[0]
    sizes = SWIN_V1_SIZES if needs_tables else SWINV2_SIZES
    like = [name for name, size in sizes.items() if (size.embed_dim, size.depths) == (width, tuple(depths))]
    return f"It looks like {like[0]}." if like else ""
