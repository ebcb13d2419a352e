"""SwinV2 derived a second time in NumPy, float64, window by window, for sizes that need padding.

Nothing is shared with the code under test, and the shift is never rolled: tokens are gathered into windows by their
coordinates, and two tokens of one window are penalised if exactly one of them was moved around an edge.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from permafrost.model.spec import SwinV2Size
from permafrost.model.swin.v2 import SwinV2

erf = np.vectorize(math.erf)


class Reference:
    def __init__(self, state: dict[str, torch.Tensor], size: SwinV2Size, windows, pretrained, interval: int) -> None:
        self.state = {name: value.double().numpy() for name, value in state.items()}
        self.size, self.windows, self.pretrained, self.interval = size, windows, pretrained, interval

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * self.state[f"{name}.weight"]
            + (self.state[f"{name}.bias"])
        )

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def position_bias(self, delta: np.ndarray, trained: int, name: str) -> np.ndarray:
        scaled = 8.0 * delta / max(trained - 1, 1)
        logarithmic = np.sign(scaled) * np.log2(np.abs(scaled) + 1.0) / 3.0
        hidden = np.maximum(self.linear(logarithmic, f"{name}.cpb_mlp.0"), 0.0)
        return 16.0 / (1.0 + np.exp(-self.linear(hidden, f"{name}.cpb_mlp.2")))

    def attention(self, x: np.ndarray, window: int, shift: int, heads: int, trained: int, name: str) -> np.ndarray:
        height, width, channels = x.shape
        tall, wide = -(-height // window) * window, -(-width // window) * window
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row in range(tall):
            for column in range(wide):
                place = (row - shift) % tall // window, (column - shift) % wide // window
                members.setdefault(place, []).append((row, column))
        out = np.zeros_like(x)
        for tokens in members.values():
            assert len(tokens) == window**2
            inside = [(row, column) for row, column in tokens if row < height and column < width]
            values = np.array([x[t] if t in inside else np.zeros(channels) for t in tokens])
            q, k, v = np.split(values @ self.state[f"{name}.qkv.weight"].T, 3, axis=1)
            q, v = q + self.state[f"{name}.q_bias"], v + self.state[f"{name}.v_bias"]
            places = np.array([((row - shift) % tall, (column - shift) % wide) for row, column in tokens])
            bias = self.position_bias((places[:, None] - places[None]).astype(float), trained, name)
            moved = np.array([(row < shift, column < shift) for row, column in tokens])
            penalty = np.where((moved[:, None] != moved[None]).any(-1), -100.0, 0.0)
            joined = []
            for head in range(heads):
                part = slice(head * channels // heads, (head + 1) * channels // heads)
                lengths = [np.maximum(np.linalg.norm(z[:, part], axis=1, keepdims=True), 1e-12) for z in (q, k)]
                cosine = (q[:, part] / lengths[0]) @ (k[:, part] / lengths[1]).T
                scale = min(math.exp(self.state[f"{name}.logit_scale"][head, 0, 0]), 100.0)
                logits = scale * cosine + bias[..., head] + penalty
                weights = np.exp(logits - logits.max(1, keepdims=True))
                joined.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
            result = self.linear(np.concatenate(joined, axis=1), f"{name}.proj")
            for token, value in zip(tokens, result, strict=True):
                if token in inside:
                    out[token] = value
        return out

    def merge(self, x: np.ndarray, name: str) -> np.ndarray:
        height, width, channels = x.shape
        out = np.zeros((-(-height // 2), -(-width // 2), 4 * channels))
        for row in range(height):
            for column in range(width):
                corner = row % 2 + 2 * (column % 2)
                out[row // 2, column // 2, corner * channels : (corner + 1) * channels] = x[row, column]
        return self.norm(self.linear(out, f"{name}.reduction"), f"{name}.norm")

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Maps a normalised image (3, H, W) to four maps (H_i, W_i, C_i)."""
        _, height, width = image.shape
        padded = np.zeros((3, -(-height // 4) * 4, -(-width // 4) * 4))
        padded[:, :height, :width] = image
        kernel = self.state["patch_embed.proj.weight"]
        x = np.array(
            [
                [np.tensordot(kernel, padded[:, r : r + 4, c : c + 4], axes=3) for c in range(0, padded.shape[2], 4)]
                for r in range(0, padded.shape[1], 4)
            ]
        )
        x = self.norm(x + self.state["patch_embed.proj.bias"], "patch_embed.norm")
        maps = []
        for stage, depth in enumerate(self.size.depths):
            window, shift = self.windows[stage], self.windows[stage] // 2
            if min(x.shape[:2]) <= window:
                window, shift = min(x.shape[:2]), 0
            for block in range(depth):
                name = f"layers.{stage}.blocks.{block}"
                attended = self.attention(
                    x,
                    window,
                    shift * (block % 2),
                    self.size.num_heads[stage],
                    self.pretrained[stage],
                    f"{name}.attn",
                )
                x = x + self.norm(attended, f"{name}.norm1")
                hidden = self.linear(x, f"{name}.mlp.fc1")
                hidden = hidden * 0.5 * (1.0 + erf(hidden / math.sqrt(2.0)))
                x = x + self.norm(self.linear(hidden, f"{name}.mlp.fc2"), f"{name}.norm2")
                if self.interval and (block + 1) % self.interval == 0:
                    x = self.norm(x, f"{name}.enorm")
            maps.append(x)
            if stage < 3:
                x = self.merge(x, f"layers.{stage}.downsample")
        return maps


@pytest.mark.parametrize(
    ("image", "windows", "pretrained", "interval"),
    [
        # Maps 20x28, 10x14, 5x7, 3x4: every stage is padded, and shifted.
        ((77, 110), (6, 4, 3, 2), (5, 4, 1, 2), 0),
        # The last three stages are clipped to the shorter side, and padded along the longer one.
        ((54, 75), (4, 8, 8, 8), (4, 6, 8, 8), 2),
        ((64, 64), (8, 4, 4, 2), (8, 4, 4, 2), 1),
    ],
)
def test_equals_the_derivation(randomise, relative_error, image, windows, pretrained, interval) -> None:
    size = SwinV2Size(8, (2, 2, 2, 2), (1, 2, 2, 4))
    model = SwinV2(size, window_size=windows, pretrained_window_size=pretrained, extra_norm_interval=interval)
    model = randomise(model).double().eval()
    images = torch.randn(2, 3, *image, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(images)
    reference = Reference(model.state_dict(), size, windows, pretrained, interval)
    for index in range(len(images)):
        expected = reference(images[index].numpy())
        for ours, other in zip(found, expected, strict=True):
            assert relative_error(ours[index].permute(1, 2, 0), torch.from_numpy(other)) < 1e-11
