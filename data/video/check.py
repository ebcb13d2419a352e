"""Find everything that is wrong with a video data set before a run."""

from __future__ import annotations

import threading
from pathlib import Path

from permafrost.data.errors import DataError
from permafrost.data.findings import Finding, inspect_all
from permafrost.data.stream.records import tolerated
from permafrost.data.task import Progress
from permafrost.data.video.config import KineticsDataConfig
from permafrost.data.video.decoder import Decoder
from permafrost.data.video.errors import VideoError
from permafrost.data.video.lists import read_split

MISSING = "missing videos"
UNREADABLE = "unreadable videos"
SHORT = "videos shorter than the sampling window, which are looped"


def check_kinetics(
    config: KineticsDataConfig, *, decode: bool = True, on_progress: Progress | None = None
) -> list[Finding]:
    """Check lists, labels, missing files and frames of every video; arguments as of `data.build.check_data`, with files in place.

    Returns:
        findings, each with its kind. A list that cannot be used, and more missing or unreadable videos than the configuration tolerates,
        are fatal; single ones are not.
    """
    findings: list[Finding] = []
    for split in ("train", "val"):
        where = str(config.paths(split)[0 if config.layout != "folders" else 1])
        try:
            listed = read_split(config, split)
        except DataError as error:
            findings.append(Finding(where, str(error).removeprefix(f"{where}: ")))
            continue
        folder = config.paths(split)[1]
        findings += [
            Finding(str(folder / name), "it is listed but not there", fatal=False, kind=MISSING)
            for name in listed.missing
        ]
        if not decode:
            continue
        found = _check_videos(config, listed.paths, on_progress)
        findings += found
        num_unreadable = sum(finding.kind == UNREADABLE for finding in found)
        limit = tolerated(len(listed.paths), config.corrupt_share)
        if num_unreadable > limit or num_unreadable == len(listed.paths):
            findings.append(
                Finding(
                    where,
                    f"{num_unreadable} of {len(listed.paths)} videos cannot be decoded, {limit} are tolerated (data.corrupt_share)",
                )
            )
    return findings


def _check_videos(config: KineticsDataConfig, paths: list[str], on_progress: Progress | None) -> list[Finding]:
    own = threading.local()
    decoders: list[Decoder] = []
    clip = config.clip
    window = (clip.num_frames - 1) * clip.frame_stride + 1 if clip.sampling == "dense" else clip.num_frames

    def problems(path: str) -> list[Finding]:
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(
                timeout=config.decode_timeout, backend=config.decoder, num_threads=config.decoder_threads
            )
            decoders.append(own.decoder)
        try:
            _, facts = own.decoder.read(Path(path), kind="segment", length=clip.num_frames)
        except VideoError as error:
            return [Finding(path, str(error), fatal=False, kind=UNREADABLE)]
        if facts["num_frames"] < window:
            what = f"it has {facts['num_frames']} frames, a clip spans {window}: it is looped"
            return [Finding(path, what, fatal=False, kind=SHORT)]
        return []

    try:
        # Decoding is in processes; a thread waits for each.
        return inspect_all(paths, problems, on_progress)
    finally:
        for decoder in decoders:
            decoder.close()
