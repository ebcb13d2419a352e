"""Clips per second and core of reading videos: the data workers' path against bare decord and bare PyAV.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [--repeats 15] [--videos 4]

Each contestant reads 16 frames, every fourth, at the same random places of 10 s videos of 340 x 256 pixels at 30 frames a second
(moving texture, x264 crf 23, key frames 250 apart at most, as uploads have them), one decoding thread. They run in turn, video by
video, so that whatever else the machine does hits all; medians are compared, on the clock ("over_decord") and in processor time of
this process and its decoding process ("cpu_over_decord"), which others on the machine disturb less.

    decord    VideoReader and get_batch, nothing else
    pyav      demux, seek and decode through our own reader in this process
    ours      Decoder: the process that can be killed, with decord inside; frames in an array of this process
    sample    ours and the training augmentation to 224 x 224: what a data worker does for one clip

"cpu_share" is that processor time over the time on the clock: 1.0 is one core kept busy. Rows are appended to
benchmarks/results/decoding.csv.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import decord
import numpy as np
import torch
from records import append

from permafrost.data.video.decoder import Decoder
from permafrost.data.video.reader import open_video
from permafrost.data.video.transforms import random_crop, to_clip

RESULTS = Path(__file__).parent / "results" / "decoding.csv"
FRAMES, STRIDE, LENGTH = 16, 4, 300


def write(path: Path, seed: int) -> None:
    """A 10 s video with motion and noise, some 1 MB."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (80, 120, 3), dtype=np.uint8).repeat(6, axis=0).repeat(6, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        stream.options = {"crf": "23", "preset": "medium"}
        for number in range(LENGTH):
            top = int(100 + 90 * np.sin(number / 40))
            picture = base[top : top + 256, number // 2 : number // 2 + 340].astype(np.int16)
            picture = np.clip(picture + rng.integers(-8, 9, picture.shape, dtype=np.int16), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def cpu_seconds(decoder: Decoder) -> float:
    """Processor time of this process and of the decoding process, where there is one yet."""
    if decoder._process is None:
        return time.process_time()
    # The processor clock of another process, as clock_getcpuclockid(3) makes it on Linux; threads that have ended count too.
    return time.process_time() + time.clock_gettime((~decoder._process.pid << 3) | 2)


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--videos", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    decoder = Decoder()

    def bare(path: Path, indices: list[int]) -> np.ndarray:
        return decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()

    def pyav(path: Path, indices: list[int]) -> np.ndarray:
        video = open_video(path, "pyav")
        frames = video.frames(indices)
        video.close()
        return frames

    def ours(path: Path, indices: list[int]) -> np.ndarray:
        return decoder.read(path, kind="frames", indices=indices)[0]

    def sample(path: Path, indices: list[int]) -> np.ndarray:
        clip = to_clip(ours(path, indices))
        return random_crop(clip, 224, torch.Generator().manual_seed(indices[0])).numpy()

    contestants: dict[str, Callable] = {"decord": bare, "pyav": pyav, "ours": ours, "sample": sample}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    busy: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.mp4" for number in range(options.videos)]
        for number, path in enumerate(paths):
            write(path, number)
        size = sum(path.stat().st_size for path in paths) / len(paths)
        rng = np.random.default_rng(0)
        for repeat in range(options.repeats + 1):
            for path in paths:
                start = int(rng.integers(0, LENGTH - (FRAMES - 1) * STRIDE))
                indices = list(range(start, start + FRAMES * STRIDE, STRIDE))
                found = {}
                for name, read in contestants.items():
                    used = cpu_seconds(decoder)
                    begin = time.perf_counter()
                    found[name] = read(path, indices)
                    # The first round warms up.
                    if repeat:
                        times[name].append(time.perf_counter() - begin)
                        busy[name].append(cpu_seconds(decoder) - used)
                if not np.array_equal(found["decord"], found["ours"]):
                    raise SystemExit("the decoding process gives other frames than decord: no time is reported")
                if np.abs(found["pyav"].astype(int) - found["decord"]).mean() > 3:
                    raise SystemExit("PyAV gives other frames than decord: no time is reported")
    decoder.close()
    base, cpu_base = statistics.median(times["decord"]), statistics.median(busy["decord"])
    rows = []
    for name, seconds in times.items():
        quantiles = statistics.quantiles(seconds, n=10)
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "contestant": name,
                "machine": f"one core of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}",
                "decord": decord.__version__,
                "pyav": av.__version__,
                "file_kb": round(size / 1000),
                "clips": len(seconds),
                "p20_ms": round(quantiles[1] * 1000, 1),
                "p50_ms": round(statistics.median(seconds) * 1000, 1),
                "p80_ms": round(quantiles[7] * 1000, 1),
                "clips_per_s": round(1 / statistics.median(seconds), 2),
                "over_decord": round(statistics.median(seconds) / base, 3),
                "cpu_p50_ms": round(statistics.median(busy[name]) * 1000, 1),
                "cpu_over_decord": round(statistics.median(busy[name]) / cpu_base, 3),
                "cpu_share": round(sum(busy[name]) / sum(seconds), 2),
            }
        )
        print(rows[-1])
    append(RESULTS, list(rows[0]), rows)


if __name__ == "__main__":
    main()
