"""Swin V1 derived a second time in NumPy, float64, window by window, for sizes that need padding or clipped windows.

Nothing is shared with the code under test. The shift is never rolled: tokens are gathered into windows by their
coordinates, and two tokens of one window are penalised if exactly one of them was moved around an edge. The bias of a
pair of tokens is looked up in the table by its offset, pair by pair.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from permafrost.model.spec import SwinV1Size
from permafrost.model.swin.v1 import SwinV1

erf = np.vectorize(math.erf)


def cubic(distance: float) -> float:
    """Weight of a sample at this distance in cubic convolution with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def stretched(table: np.ndarray, new: int) -> np.ndarray:
    """A (2P - 1, 2P - 1, A) table for windows of `new`: offset by offset, samples beyond the border repeat it."""
    old_reach, reach = table.shape[0] // 2, new - 1
    ratio = table.shape[0] / (2 * new - 1)
    out = np.zeros((2 * new - 1, 2 * new - 1, table.shape[2]))
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            places = row * ratio, column * ratio
            for i in range(math.floor(places[0]) - 1, math.floor(places[0]) + 3):
                for j in range(math.floor(places[1]) - 1, math.floor(places[1]) + 3):
                    inside = [min(max(n, -old_reach), old_reach) + old_reach for n in (i, j)]
                    weight = cubic(places[0] - i) * cubic(places[1] - j)
                    out[row + reach, column + reach] += weight * table[inside[0], inside[1]]
    return out


class Reference:
    """The network for one image, with `windows` configured and tables that belong to `pretrained`."""

    def __init__(self, state: dict[str, torch.Tensor], size: SwinV1Size, windows, pretrained) -> None:
        self.state = {name: value.double().numpy() for name, value in state.items()}
        self.size, self.windows, self.pretrained = size, windows, pretrained

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def attention(self, x: np.ndarray, stage: int, window: int, shift: int, name: str) -> np.ndarray:
        height, width, channels = x.shape
        heads, old = self.size.num_heads[stage], 2 * self.pretrained[stage] - 1
        table = self.state[f"{name}.relative_position_bias_table"].reshape(old, old, heads)
        if self.windows[stage] != self.pretrained[stage]:
            table = stretched(table, self.windows[stage])
        middle = table.shape[0] // 2
        tall, wide = -(-height // window) * window, -(-width // window) * window
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row in range(tall):
            for column in range(wide):
                members.setdefault(((row - shift) % tall // window, (column - shift) % wide // window), []).append(
                    (row, column)
                )
        out = np.zeros_like(x)
        for tokens in members.values():
            assert len(tokens) == window**2
            inside = [row < height and column < width for row, column in tokens]
            values = np.array([x[t] if kept else np.zeros(channels) for t, kept in zip(tokens, inside, strict=True)])
            q, k, v = np.split(self.linear(values, f"{name}.qkv"), 3, axis=1)
            places = [((row - shift) % tall, (column - shift) % wide) for row, column in tokens]
            bias = np.array(
                [[table[a[0] - b[0] + middle, a[1] - b[1] + middle] for b in places] for a in places]
            )  # (query, key, head)
            moved = np.array([(row < shift, column < shift) for row, column in tokens])
            penalty = np.where((moved[:, None] != moved[None]).any(-1), -100.0, 0.0)
            joined = []
            for head in range(heads):
                part = slice(head * channels // heads, (head + 1) * channels // heads)
                logits = q[:, part] @ k[:, part].T / math.sqrt(channels // heads) + bias[..., head] + penalty
                weights = np.exp(logits - logits.max(1, keepdims=True))
                joined.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
            result = self.linear(np.concatenate(joined, axis=1), f"{name}.proj")
            for token, kept, value in zip(tokens, inside, result, strict=True):
                if kept:
                    out[token] = value
        return out

    def merge(self, x: np.ndarray, name: str) -> np.ndarray:
        height, width, channels = x.shape
        out = np.zeros((-(-height // 2), -(-width // 2), 4 * channels))
        for row in range(height):
            for column in range(width):
                corner = row % 2 + 2 * (column % 2)
                out[row // 2, column // 2, corner * channels : (corner + 1) * channels] = x[row, column]
        return self.linear(self.norm(out, f"{name}.norm"), f"{name}.reduction")

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Maps a normalised image (3, H, W) to four maps (H_i, W_i, C_i)."""
        _, height, width = image.shape
        padded = np.zeros((3, -(-height // 4) * 4, -(-width // 4) * 4))
        padded[:, :height, :width] = image
        kernel = self.state["patch_embed.proj.weight"]
        rows, columns = range(0, padded.shape[1], 4), range(0, padded.shape[2], 4)
        x = np.array([[np.tensordot(kernel, padded[:, r : r + 4, c : c + 4], axes=3) for c in columns] for r in rows])
        x = self.norm(x + self.state["patch_embed.proj.bias"], "patch_embed.norm")
        maps = []
        for stage, depth in enumerate(self.size.depths):
            window, shift = self.windows[stage], self.windows[stage] // 2
            if min(x.shape[:2]) <= window:
                window, shift = min(x.shape[:2]), 0
            for block in range(depth):
                name = f"layers.{stage}.blocks.{block}"
                x = x + self.attention(
                    self.norm(x, f"{name}.norm1"), stage, window, shift * (block % 2), f"{name}.attn"
                )
                hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
                hidden = hidden * 0.5 * (1.0 + erf(hidden / math.sqrt(2.0)))
                x = x + self.linear(hidden, f"{name}.mlp.fc2")
            maps.append(x)
            if stage < 3:
                x = self.merge(x, f"layers.{stage}.downsample")
        return maps


@pytest.mark.parametrize(
    ("image", "windows", "pretrained"),
    [
        # Maps 20x28, 10x14, 5x7, 3x4: every stage is padded, and shifted.
        ((77, 110), (6, 4, 3, 2), (6, 4, 3, 2)),
        # Maps 14x19, 7x10, 4x5, 2x3: the last three are clipped to the shorter side, and padded along the longer one.
        ((54, 75), (4, 8, 8, 8), (4, 8, 8, 8)),
        ((64, 64), (8, 4, 4, 2), (8, 4, 4, 2)),
        # Resampled to larger and to smaller windows; the last two stages clip a resampled window.
        ((54, 75), (5, 4, 6, 5), (3, 6, 4, 7)),
    ],
)
def test_equals_the_derivation(randomise, relative_error, image, windows, pretrained) -> None:
    size = SwinV1Size(8, (2, 2, 2, 2), (1, 2, 2, 4))
    model = SwinV1(size, window_size=windows, pretrained_window_size=pretrained)
    model = randomise(model).double().eval()
    images = torch.randn(2, 3, *image, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(images)
    reference = Reference(model.state_dict(), size, windows, pretrained)
    for index in range(len(images)):
        expected = reference(images[index].numpy())
        for ours, other in zip(found, expected, strict=True):
            assert relative_error(ours[index].permute(1, 2, 0), torch.from_numpy(other)) < 1e-11
