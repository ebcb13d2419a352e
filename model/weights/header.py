"""Encode the header of our own weights files: what a network says about itself in text, beside its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES


def encode_header(values: Mapping[str, Any]) -> dict[str, str]:
    """Encode fields: text stays as it is, anything else becomes JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def decode_header(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Decode the fields that are read back; the others stay text."""

    def integers(value: Any, count: int) -> tuple[int, ...]:
        if len(value) != count or any(type(one) is not int or one < 1 for one in value):
            raise ValueError
        return tuple(value)

    def statistics(value: Any) -> tuple[float, ...]:
        if len(value) != 3 or not all(math.isfinite(one) for one in value):
            raise ValueError
        return tuple(map(float, value))

    decoders = {
        "window_size": lambda value: integers(value, NUM_STAGES),
        "pretrained_window_size": lambda value: integers(value, NUM_STAGES),
        "image_size": lambda value: integers([value], 1)[0],
        "num_classes": lambda value: integers([value], 1)[0],
        "extra_norm_interval": lambda value: integers([value + 1], 1)[0] - 1,
        "mean": statistics,
        "std": statistics,
    }
    decoded: dict[str, Any] = {}
    for key, text in header.items():
        try:
            decoded[key] = decoders[key](json.loads(text)) if key in decoders else text
            if key == "std" and min(decoded[key]) <= 0:
                raise ValueError
        except (ValueError, TypeError) as error:
            raise WeightsError(
                f"{path}: its header says {key}={text}, which cannot be read; write the file again."
            ) from error
    return decoded
