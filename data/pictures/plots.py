"""Plot figures of an evaluation as pixels for TensorBoard: the confusion matrix of any task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAMED = 30
"""Classes up to which each has its name and numbers in the confusion matrix; beyond, they would be specks."""


def confusion_picture(matrix: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix, each row as shares of its sum.

    Args:
        matrix: (K, K); or (K + 1, K + 1), the last for what is of no class (see confusion.confusion_matrix).
        classes: the K names.

    Returns:
        (H, W, 3) uint8.
    """
    names = [*classes, "background"][: len(matrix)]
    is_named = len(names) <= MAX_NAMED
    side = max(5.0, 0.5 * len(names)) if is_named else 9.0
    figure = new_figure(side + 1.5, side + 0.8)
    axes = figure.add_subplot(1, 1, 1)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="found as", ylabel="true")
    if is_named:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(matrix)):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    return pixels_of(figure)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, 100 pixels each."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def pixels_of(figure: Figure) -> np.ndarray:
    """Return a figure as (H, W, 3) uint8."""
    # A canvas of its own: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
