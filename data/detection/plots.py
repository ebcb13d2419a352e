"""Plot precision over recall of detections, as pixels for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from permafrost.data.pictures.plots import new_figure, pixels_of

SHOWN_IOUS = (0.5, 0.75, 0.9)


def precision_curves(
    precisions: Mapping[str, np.ndarray], ious: Sequence[float], recalls: Sequence[float]
) -> np.ndarray:
    """Draw precision over recall, mean over the classes that occur, a panel for each kind and a line for each of SHOWN_IOUS.

    Args:
        precisions: by kind ("bbox", "segm"), (T, R, K) as COCOeval gives it for all sizes and the largest number of detections; -1
            where a class does not occur.
        ious: the T thresholds.
        recalls: the R recalls.

    Returns:
        (H, W, 3) uint8.
    """
    figure = new_figure(4.5 * len(precisions), 4.0)
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
    return pixels_of(figure)
