"""Readers, sampling and the decoding process: both backends agree, every bad file is named, nothing hangs."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import video_files

from permafrost.data.video.decoder import Decoder
from permafrost.data.video.errors import VideoError
from permafrost.data.video.reader import chosen_backend, open_video
from permafrost.data.video.resize import resize_folder, resize_video
from permafrost.data.video.sampling import dense_indices, segment_indices

BACKENDS = ("decord", "pyav")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return video_files.write_numbered(tmp_path_factory.mktemp("videos") / "plain.mp4")


@pytest.fixture
def decoder() -> Iterator[Callable[..., Decoder]]:
    made = []

    def make(**options) -> Decoder:
        made.append(Decoder(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("indices", [[0, 1, 2], [39], [5, 17, 17, 3, 38], list(range(0, 40, 3)), [13, 26, 39]])
def test_frames_are_those_asked_for(video, backend, indices) -> None:
    reader = open_video(video, backend)
    assert reader.num_frames == 40
    assert reader.rate == pytest.approx(10)
    frames = reader.frames(indices)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(indices), 64, 96, 3)
    assert [video_files.number_of(frame) for frame in frames] == indices
    red, green, blue = frames[0, 4, 4].astype(int)
    assert red > green + 100
    assert red > blue + 100
    reader.close()


def test_backends_give_the_same_pictures(video) -> None:
    one, other = (open_video(video, backend).frames(range(0, 40, 4)).astype(int) for backend in BACKENDS)
    # Both are FFmpeg's pictures; their conversion from YUV rounds differently.
    assert np.abs(one - other).max() <= 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_frame_rate_counts_pictures(tmp_path, backend) -> None:
    times = np.cumsum([0, *([3000] * 9), *([9000] * 10), *([1500] * 9)]).tolist()
    path = video_files.write_with(tmp_path / "vfr.mp4", video_files.numbered_frames(29), rate=30, times=times)
    reader = open_video(path, backend)
    assert reader.num_frames == 29
    assert [video_files.number_of(frame) for frame in reader.frames([0, 9, 12, 20, 28])] == [0, 9, 12, 20, 28]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_in_the_header_is_applied(tmp_path, backend, rotation) -> None:
    stored = video_files.numbered_frames(5)
    path = video_files.write_with(tmp_path / "turned.mp4", stored, rotation=rotation)
    frames = open_video(path, backend).frames([2])
    expected = np.rot90(stored[2], rotation // 90)
    assert frames[0].shape == expected.shape
    assert np.abs(frames[0].astype(int) - expected).mean() < 8
    assert np.abs(frames[0].astype(int) - np.rot90(expected, 2)).mean() > 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.mp4", "there is no such file"),
        (lambda folder: _written(folder / "empty.mp4", b""), "the file is empty"),
        (lambda folder: _written(folder / "zeros.mp4", bytes(4096)), "begins with zeros"),
        (lambda folder: _without_codec(folder / "codec.mp4"), "nothing here decodes its video's codec"),
        (lambda folder: _written(folder / "text.mp4", b"not a video at all " * 50), "cannot be opened"),
        (lambda folder: video_files.write_audio(folder / "sound.mp4"), "no video stream, only audio"),
        (lambda folder: _picture(folder / "photo.mp4", "JPEG"), "it is a JPEG picture, not a video"),
        (lambda folder: _picture(folder / "drawing.mp4", "PNG"), "it is a PNG picture, not a video"),
        (lambda folder: _picture(folder / "web.mp4", "WEBP"), "it is a WebP picture, not a video"),
    ],
)
def test_what_is_no_video_is_named(tmp_path, backend, make, message) -> None:
    with pytest.raises(VideoError, match=message):
        open_video(make(tmp_path), backend)


def _written(path, content) -> Path:
    path.write_bytes(content)
    return path


def _without_codec(path) -> Path:
    video_files.write_numbered(path, 4)
    return _written(path, path.read_bytes().replace(b"avc1", b"xyz9"))


def _picture(path, kind) -> Path:
    Image.new("RGB", (64, 48), (200, 10, 10)).save(path, format=kind)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hole_in_the_pictures_is_an_error_and_no_other_picture(tmp_path, backend) -> None:
    """Frames 12 to 23, from one key frame to the next, are zeros: frame 24 must not be taken for them."""
    import av

    path = video_files.write_numbered(tmp_path / "hole.mp4", 36)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for packet in packets[12:24]:
            content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(content)
    if backend == "pyav":
        # decord reads ahead, into the hole.
        assert video_files.number_of(open_video(path, backend).frames([3])[0]) == 3
    for wanted in ([13], [5, 14, 30], [12, 23]):
        with pytest.raises(VideoError, match=r"cannot be decoded|have no picture|decoding ends"):
            open_video(path, backend).frames(wanted)


def test_frames_too_narrow_for_decord_say_so(tmp_path) -> None:
    path = video_files.write_numbered(tmp_path / "narrow.mp4", 4, height=48, width=48)
    assert open_video(path, "pyav").frames([0, 3]).shape == (2, 48, 48, 3)
    with pytest.raises(VideoError, match=r"use data\.decoder pyav"):
        open_video(path, "decord").frames([0, 3])


def test_auto_is_decord_where_it_is() -> None:
    assert chosen_backend("auto") == "decord"


def test_dense_windows() -> None:
    assert dense_indices(300, 16, 4).tolist() == list(range(120, 181, 4))
    starts = [dense_indices(300, 32, 2, clip=clip, num_clips=4)[0] for clip in range(4)]
    assert starts == [0, 79, 158, 237]
    assert dense_indices(300, 32, 2, clip=3, num_clips=4)[-1] == 299
    draws = [dense_indices(100, 8, 4, draw=draw)[0] for draw in np.linspace(0, 0.9999, 400)]
    assert sorted(set(draws)) == list(range(72))
    # A window in the middle of the video is also in the middle of the video played backwards.
    assert (23 - dense_indices(24, 8, 3)[::-1]).tolist() == dense_indices(24, 8, 3).tolist()


def test_a_video_shorter_than_the_window_is_looped() -> None:
    assert dense_indices(10, 8, 4).tolist() == [0, 4, 8, 2, 6, 0, 4, 8]
    assert dense_indices(1, 4, 2, draw=0.7).tolist() == [0, 0, 0, 0]
    assert segment_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]


def test_segments() -> None:
    assert segment_indices(80, 8).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    drawn = segment_indices(80, 8, draws=[0, 0.999] * 4)
    assert drawn.tolist() == [0, 19, 20, 39, 40, 59, 60, 79]
    clips = [segment_indices(80, 2, clip=clip, num_clips=4).tolist() for clip in range(4)]
    assert clips == [[5, 45], [15, 55], [25, 65], [35, 75]]


def test_a_process_gives_what_the_reader_gives(video, decoder) -> None:
    one = decoder(backend="pyav")
    frames, facts = one.read(video, kind="dense", length=5, stride=3, draw=0.5)
    assert facts["num_frames"] == 40
    assert [video_files.number_of(frame) for frame in frames] == facts["indices"]
    assert np.array_equal(frames, open_video(video, "pyav").frames(facts["indices"]))
    _, facts = one.read(video, kind="segment", length=4)
    assert facts["indices"] == [5, 15, 25, 35]
    assert len(one.read(video, kind="all", most=7)[0]) == 7
    for backend in BACKENDS:
        # Frames do not depend on the number of threads.
        frames, _ = decoder(backend=backend, num_threads=2).read(video, kind="frames", indices=[5, 39, 0])
        assert np.array_equal(frames, open_video(video, backend).frames([5, 39, 0]))


def test_a_decode_that_never_returns_or_crashes_costs_one_video(video, tmp_path, decoder, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ("stuck.mp4", "abort.mp4", "exit.mp4"):
        shutil.copy(video, tmp_path / name)
    one = decoder(timeout=2.0, reader="stuck_reader:open_video")
    one.read(video, kind="frames", indices=[0])
    start = time.monotonic()
    with pytest.raises(VideoError, match="not done after 2 s"):
        one.read(tmp_path / "stuck.mp4", kind="frames", indices=[0])
    assert time.monotonic() - start < 10
    with pytest.raises(VideoError, match=r"killed the process that decoded it \(signal SIGABRT\)"):
        one.read(tmp_path / "abort.mp4", kind="frames", indices=[0])
    with pytest.raises(VideoError, match="exit code 3"):
        one.read(tmp_path / "exit.mp4", kind="frames", indices=[0])
    assert video_files.number_of(one.read(video, kind="frames", indices=[7])[0][0]) == 7


def test_a_named_pipe_nobody_writes_to_does_not_hold_the_run(tmp_path, decoder) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    one = decoder(timeout=1.0)
    with pytest.raises(VideoError, match="not done after 1 s"):
        one.read(tmp_path / "pipe.mp4", kind="all", most=1)


def test_the_process_ends_with_its_owner(video, decoder) -> None:
    one = decoder()
    one.read(video, kind="frames", indices=[0])
    child = one._process.pid
    pid = os.fork()
    if pid == 0:
        # A forked worker must not talk to the parent's process, nor end it.
        other = 1
        try:
            one.read(video, kind="frames", indices=[1])
            other = 0 if one._process.pid != child else 2
            one.close()
        finally:
            os._exit(other)
    assert os.waitpid(pid, 0)[1] == 0
    assert video_files.number_of(one.read(video, kind="frames", indices=[9])[0][0]) == 9
    assert one._process.pid == child
    one.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_resizing_keeps_frames_times_and_rotation(tmp_path) -> None:
    times = [0, 9000, 12000, 30000, 36000]
    path = video_files.write_with(
        tmp_path / "in.mp4", video_files.numbered_frames(5, 96, 128), rate=30, times=times, rotation=90
    )
    facts = resize_video(path, tmp_path / "out" / "small.mp4", 84)
    assert facts == {"num_frames": 5, "width": 112, "height": 84}
    for backend in BACKENDS:
        frames = open_video(tmp_path / "out" / "small.mp4", backend).frames(range(5))
        assert frames.shape == (5, 112, 84, 3)
        assert [video_files.number_of(np.rot90(frame, -1)) for frame in frames] == [0, 1, 2, 3, 4]
    reader = open_video(tmp_path / "out" / "small.mp4", "pyav")
    seconds = reader._times * float(reader._stream.time_base)
    assert seconds - seconds[0] == pytest.approx(np.array(times) / 90000, abs=2e-3)
    # Never enlarged.
    assert resize_video(path, tmp_path / "same.mp4", 500)["height"] == 96


def test_a_folder_is_resized_once_and_broken_files_are_listed(video, tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "dance").mkdir(parents=True)
    shutil.copy(video, source / "dance" / "a.mp4")
    shutil.copy(video, source / "b.mp4")
    (source / "c.mp4").write_bytes(video.read_bytes()[:300])
    (source / "list.txt").write_text("b.mp4 0\n")
    done = resize_folder(source, target, 64, num_processes=2)
    assert (done.num_written, done.num_present) == (2, 0)
    assert [name for name, _ in done.failures] == ["c.mp4"]
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == ["b.mp4", "dance/a.mp4"]
    again = resize_folder(source, target, 64, num_processes=1)
    assert (again.num_written, again.num_present) == (0, 2)
    assert open_video(target / "b.mp4").frames([3]).shape == (1, 64, 96, 3)
