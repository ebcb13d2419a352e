"""Pictures of an evaluation: precision over recall, and the confusion matrix, as pixels for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_IOUS = (0.5, 0.75, 0.9)
MAX_NAMED = 30
"""Classes up to which each has its name and numbers in the confusion matrix; beyond, they would be specks."""


def precision_curves(
    precisions: Mapping[str, np.ndarray], ious: Sequence[float], recalls: Sequence[float]
) -> np.ndarray:
    """Precision over recall, mean over the classes that occur, a panel for each kind and a line for each of SHOWN_IOUS.

    Args:
        precisions: by kind ("bbox", "segm"), (T, R, K) as COCOeval gives it for all sizes and the largest number of detections; -1
            where a class does not occur.
        ious: the T thresholds.
        recalls: the R recalls.

    Returns:
        (H, W, 3) uint8.
    """
    figure = _figure(4.5 * len(precisions), 4.0)
    for number, (kind, precision) in enumerate(precisions.items(), start=1):
        axes = figure.add_subplot(1, len(precisions), number)
        for wanted in SHOWN_IOUS:
            nearest = int(np.abs(np.asarray(ious) - wanted).argmin())
            occurs = precision[nearest].min(axis=0) > -1
            if not occurs.any():
                continue
            curve = precision[nearest][:, occurs].mean(axis=1)
            axes.plot(recalls, curve, label=f"IoU {ious[nearest]:.2f}, AP {curve.mean():.3f}")
        axes.set(title=kind, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="lower left")
    return _pixels(figure)


def confusion_picture(matrix: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """A confusion matrix, each row as shares of its sum.

    Args:
        matrix: (K, K); or (K + 1, K + 1), the last for what is of no class (see confusion.confusion_matrix).
        classes: the K names.

    Returns:
        (H, W, 3) uint8.
    """
    names = [*classes, "background"][: len(matrix)]
    is_named = len(names) <= MAX_NAMED
    side = max(5.0, 0.5 * len(names)) if is_named else 9.0
    figure = _figure(side + 1.5, side + 0.8)
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
    return _pixels(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _pixels(figure: Figure) -> np.ndarray:
    # A canvas of its own: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
