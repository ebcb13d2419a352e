"""Compute the accuracy of video classification over several views of each video."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from permafrost.data.errors import DataError
from permafrost.data.pictures.plots import confusion_picture
from permafrost.data.stream.records import tolerated
from permafrost.data.video.types import ClipResult

TOP = 5


class VideoEvaluator:
    """Averages the probabilities of a video's views, then counts.

    Each rank collects its share (`update`), the shares meet on one (`state`, `merge`), and that one scores (`compute`).

    Args:
        labels: of every video, 0..K-1.
        classes: names by label.
        num_views: views that every readable video must have.
        names: of every video, for results_json; numbers without.
        num_missing: listed videos that are not there, to be reported.
        corrupt_share: largest share of unreadable videos (a few always are) that an accuracy is given for.
    """

    def __init__(
        self,
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        num_views: int = 1,
        names: Sequence[str] = (),
        num_missing: int = 0,
        corrupt_share: float = 0.0,
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)
        self.num_views = num_views
        self.names = list(names) or [str(index) for index in range(len(labels))]
        self.num_missing = num_missing
        self.limit = tolerated(len(labels), corrupt_share)
        self._found: dict[tuple[int, int], np.ndarray | None] = {}

    def update(self, results: Sequence[ClipResult]) -> None:
        """Take in the results of some clips, on any device.

        Raises:
            DataError: a clip that was seen before, an unknown one, or scores that are no probabilities of K classes.
        """
        for result in results:
            key = (result.video_id, result.view)
            if not 0 <= result.video_id < len(self.labels) or not 0 <= result.view < self.num_views:
                raise DataError(
                    f"a result for view {result.view} of video {result.video_id}, which the data set does not have"
                )
            if key in self._found:
                raise DataError(f"two results for view {result.view} of video {self.names[result.video_id]}")
            scores = result.scores.detach().cpu().double().numpy()
            if scores.shape != (len(self.classes),) or not np.isfinite(scores).all():
                raise DataError(
                    f"scores of {self.names[result.video_id]} are of shape {scores.shape} or not finite: "
                    f"{len(self.classes)} probabilities are expected"
                )
            self._found[key] = scores if result.is_readable else None

    def state(self) -> dict[str, Any]:
        """Return what this rank collected, as plain values for `merge`."""
        return {"found": self._found}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace what was collected by the union of all ranks' states, this rank's included.

        Raises:
            DataError: two ranks give results for one clip.
        """
        found: dict[tuple[int, int], np.ndarray | None] = {}
        for state in states:
            for key, scores in state["found"].items():
                if key in found:
                    raise DataError(f"results for view {key[1]} of video {self.names[key[0]]} came from two ranks")
                found[key] = scores
        self._found = found

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) positions of the readable videos and (N, K) mean probabilities over their views.

        A video of which a view cannot be decoded counts as unreadable as a whole.

        Raises:
            DataError: views without a result, or more unreadable videos than the limit.
        """
        absent = len(self.labels) * self.num_views - len(self._found)
        if absent:
            raise DataError(f"{absent} of {len(self.labels) * self.num_views} views have no result")
        unreadable = {video for (video, _), scores in self._found.items() if scores is None}
        if len(unreadable) > self.limit or len(unreadable) == len(self.labels):
            shown = ", ".join(self.names[video] for video in sorted(unreadable)[:TOP])
            raise DataError(
                f"{len(unreadable)} of {len(self.labels)} validation videos cannot be decoded, {self.limit} are tolerated "
                f"(data.corrupt_share): {shown}"
            )
        videos = [video for video in range(len(self.labels)) if video not in unreadable]
        scores = {key: found for key, found in self._found.items() if found is not None}
        means = [np.mean([scores[video, view] for view in range(self.num_views)], axis=0) for video in videos]
        return np.asarray(videos), np.stack(means)

    def compute(self) -> dict[str, float]:
        """Return "video/top1", "video/top5", "video/mean_class" (0..1), "video/top1-<class>", and what they are over.

        That is "video/num_videos", "video/num_clips", "video/num_unreadable" and "video/num_missing".
        A class without a video is left out. Among equal scores the true class counts as the last one.
        """
        videos, scores = self.scores()
        labels = self.labels[videos]
        true = scores[np.arange(len(labels)), labels]
        rank = (scores >= true[:, None]).sum(axis=1) - 1
        metrics = {"video/top1": float((rank == 0).mean()), "video/top5": float((rank < TOP).mean())}
        by_class = {
            name: float((rank[labels == number] == 0).mean())
            for number, name in enumerate(self.classes)
            if (labels == number).any()
        }
        metrics["video/mean_class"] = float(np.mean(list(by_class.values())))
        metrics["video/num_videos"] = float(len(videos))
        metrics["video/num_clips"] = float(len(videos) * self.num_views)
        metrics["video/num_unreadable"] = float(len(self.labels) - len(videos))
        metrics["video/num_missing"] = float(self.num_missing)
        metrics.update({f"video/top1-{name}": value for name, value in by_class.items()})
        return metrics

    def confusion(self) -> np.ndarray:
        """Count the videos of the row's class that were taken for the column's, (K, K) int64."""
        videos, scores = self.scores()
        matrix = np.zeros((len(self.classes),) * 2, dtype=np.int64)
        np.add.at(matrix, (self.labels[videos], scores.argmax(axis=1)), 1)
        return matrix

    def result_files(self, head: str) -> dict[str, bytes]:
        """Return results_<head>.json with the content of `results_json`, and the confusion matrix as results_<head>_confusion.png."""
        picture = io.BytesIO()
        Image.fromarray(confusion_picture(self.confusion(), self.classes)).save(picture, format="PNG")
        return {
            f"results_{head}.json": json.dumps(self.results_json()).encode(),
            f"results_{head}_confusion.png": picture.getvalue(),
        }

    def results_json(self) -> list[dict[str, Any]]:
        """Return, for each readable video, its name, its class and the five best with their probabilities."""
        videos, scores = self.scores()
        listed = []
        for video, row in zip(videos.tolist(), scores):
            best = np.argsort(-row, kind="stable")[:TOP]
            listed.append(
                {
                    "video": self.names[video],
                    "label": self.classes[self.labels[video]],
                    "num_views": self.num_views,
                    "top": [{"label": self.classes[k], "score": round(float(row[k]), 6)} for k in best],
                }
            )
        return listed

    def pictures(self) -> dict[str, np.ndarray]:
        """Draw the confusion matrix."""
        return {"confusion": confusion_picture(self.confusion(), self.classes)}
