"""Find the windows that weights were trained with, and choose those they are used with.

The position bias of SwinV2 is a function of coordinates that are divided by the window of training. It can be evaluated
for any window, so wrong windows load without a word and only make the features worse. Hence the rules here.

A file states two things per stage. `window_size` is the window the stage had: the configured one, or the whole map
where that was smaller. `pretrained_window_size` is the window that scaled the coordinates: the same number in most
files, the window of the first training in those that were fine-tuned with a larger one (the released `12to16` files:
window (16, 16, 16, 8), pretrained (12, 12, 12, 6)). The second belongs to the weights and can only be confirmed. The
first can be changed: to another window on purpose, which has to be said by giving the second as well.

Unless told otherwise every stage of a SwinV2 is used with the *configured* window, the largest of the four, as the
released code does: a model trained at 192 pixels had a window of 6 in its last stage because the map was 6 x 6; on a
large image that stage runs windows of 12 whose coordinates are still divided by 6 - 1. Maps that are smaller clip the
window again.

Swin V1 has a table of position biases instead, one entry per offset, so the window shows in its shape: a table of
(2W - 1) ** 2 entries belongs to windows of W, and both statements are W. Another window means resampled tables (see
permafrost.model.swin.v1), other biases than those of training. So every stage keeps the window of its own table, and
whatever differs has to be said, the configured window in a stage whose map was smaller included: a model trained at 224
pixels with windows of 14 has tables of 14, 14, 14 and 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES, per_stage

_BUFFER = re.compile(
    r"(?:^|\.)layers\.(\d+)\.blocks\.\d+\.(attn\.relative_coords_table|attn\.relative_position_index|attn_mask)$"
)
_TABLE = re.compile(r"(?:^|\.)layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table$")


@dataclass(frozen=True)
class Windows:
    """The windows of all stages; None where a file does not tell.

    Attributes:
        window_size: side of the windows, per stage.
        pretrained_window_size: window that scales the coordinates of the position bias, or whose offsets the position
            table lists, per stage.
    """

    window_size: tuple[int, ...] | None
    pretrained_window_size: tuple[int, ...] | None


def is_buffer(name: str) -> bool:
    """Return whether the official code would rebuild this tensor: it says something about the windows, and is not a weight."""
    return _BUFFER.search(name) is not None


def windows_of_buffers(tensors: Mapping[str, Tensor], *, source: str) -> Windows:
    """Read the windows from the buffers that official checkpoints carry, and from the position tables of a Swin V1.

    Shapes give the window: (1, 2W - 1, 2W - 1, 2) of the coordinates, (L, L) of the index, (N, L, L) of the mask. The
    largest coordinate, log2(8 * (W - 1) / (P - 1) + 1) / 3, gives the pretrained window P. A position table of
    (2W - 1) ** 2 rows gives both; one with another number of rows says nothing, and is refused when it is compared with
    the network.

    Raises:
        WeightsError: if they contradict one another.
    """
    sides: dict[int, set[int]] = {}
    pretrained: dict[int, set[int]] = {}
    for name, tensor in tensors.items():
        if match := _TABLE.search(name):
            side = (math.isqrt(tensor.shape[0]) + 1) // 2 if tensor.ndim == 2 else 0
            if side and (2 * side - 1) ** 2 == tensor.shape[0]:
                for found in (sides, pretrained):
                    found.setdefault(int(match[1]), set()).add(side)
            continue
        match = _BUFFER.search(name)
        if match is None:
            continue
        stage = int(match[1])
        if match[2] != "attn.relative_coords_table":
            sides.setdefault(stage, set()).add(math.isqrt(tensor.shape[-1]))
            continue
        side = (tensor.shape[1] + 1) // 2
        sides.setdefault(stage, set()).add(side)
        largest = float(tensor.max())
        if side == 1 or not 0.0 < largest < math.inf:
            pretrained.setdefault(stage, set()).add(side)
        else:
            pretrained.setdefault(stage, set()).add(round(8.0 * (side - 1) / (8.0**largest - 1.0)) + 1)

    def joined(found: dict[int, set[int]], what: str) -> tuple[int, ...] | None:
        for stage, values in sorted(found.items()):
            if len(values) > 1:
                raise WeightsError(
                    f"{source}: its blocks of stage {stage + 1} disagree about the {what}: {sorted(values)}. "
                    "The file is damaged or was put together from several."
                )
        if set(found) != set(range(NUM_STAGES)):
            return None
        return tuple(next(iter(found[stage])) for stage in range(NUM_STAGES))

    return Windows(joined(sides, "window"), joined(pretrained, "pretrained window"))


def choose_windows(
    stored: Windows,
    *,
    window_size: int | Sequence[int] | None,
    pretrained_window_size: int | Sequence[int] | None,
    source: str,
    position_tables: bool = False,
) -> Windows:
    """Reconcile what the file states with what the recipe asks for.

    Args:
        stored: what the file states.
        window_size: the recipe's window; None takes the file's.
        pretrained_window_size: the recipe's statement about the weights; None takes the file's.
        source: the file, for errors.
        position_tables: whether the network is a Swin V1, whose biases are a table that belongs to one window.

    Returns:
        Windows without None; with None only for position tables that the file does not have, which is for the
        comparison with the network to say.

    Raises:
        WeightsError: if recipe and file contradict each other, or neither knows.
    """
    wanted = None if window_size is None else per_stage(window_size, field="window_size")
    stated = None
    if pretrained_window_size is not None:
        stated = per_stage(pretrained_window_size, field="pretrained_window_size")
    if stated and stored.pretrained_window_size and stated != stored.pretrained_window_size:
        raise WeightsError(
            f"{source} was trained with pretrained_window_size={stored.pretrained_window_size}, but the recipe says "
            f"{stated}. Leave it out: it is read from the file."
        )
    pretrained = stored.pretrained_window_size or stated
    if position_tables and stored.window_size is None:
        return Windows(wanted, pretrained)
    if pretrained is None or (wanted is None and stored.window_size is None):
        missing = [] if wanted or stored.window_size else ["window_size"]
        missing += [] if pretrained else ["pretrained_window_size"]
        raise WeightsError(
            f"{source} does not say with which windows it was trained, and its weights would load with any. Give "
            f"{' and '.join(missing)}: a released model of 192 pixels, for example, has window_size=12 and "
            "pretrained_window_size=(12, 12, 12, 6)."
        )
    if stored.window_size is None:
        return Windows(wanted, pretrained)
    configured = stored.window_size if position_tables else (max(stored.window_size),) * NUM_STAGES
    if wanted is None:
        return Windows(configured, pretrained)
    agrees = all(one in pair for one, *pair in zip(wanted, stored.window_size, configured, strict=True))
    if not agrees and stated is None:
        consequence = "; its position tables are then resampled" if position_tables else ""
        raise WeightsError(
            f"{source} was trained with window_size={stored.window_size}, but the recipe asks for {wanted}. Leave "
            f"window_size out, or, if another window is meant, say so by also giving "
            f"pretrained_window_size={pretrained}{consequence}."
        )
    return Windows(wanted, pretrained)
