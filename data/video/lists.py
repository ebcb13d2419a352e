"""The videos that a split has, with their classes, in Kinetics' three layouts.

list      ROOT/train.txt, val.txt: a line `path label` per video, paths relative to ROOT/train, ROOT/val
csv       ROOT/train.csv, val.csv: label,youtube_id,time_start,time_end,split (the official annotation); videos are
          ROOT/train/[<label>/]<youtube_id>_<start>_<end>.mp4, times in six digits, as the public downloaders name them
folders   ROOT/train/<class>/*.mp4, ROOT/val/<class>/*.mp4
"""

from __future__ import annotations

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from permafrost.data.errors import DataError
from permafrost.data.stream.records import Listing
from permafrost.data.video.config import EXTENSIONS, KineticsDataConfig

_SHOWN = 5
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass
class VideoList:
    """The videos of one split.

    Attributes:
        paths: those that are there, in the order of the list.
        labels: of these, 0..K-1.
        classes: K names.
        missing: listed paths that are not there.
        digest: hash of the names and labels of all that are listed.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str]
    missing: list[str]
    digest: str


def read_split(config: KineticsDataConfig, split: str) -> VideoList:
    """Return the videos of "train" or "val".

    Raises:
        DataError: a file or folder is not there, a line cannot be read, a label is outside the classes, nothing is listed, or
            more videos are missing than `data.missing_share` allows.
    """
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(
            f"data.root is {config.root!r}: there is no such folder; data.layout {config.layout!r} reads {_layout(config)}"
        )
    listed, folder = config.paths(split)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder of videos; data.layout {config.layout!r} reads {_layout(config)}"
        )
    if config.layout != "folders" and not listed.is_file():
        raise DataError(f"{listed}: there is no such list; data.layout {config.layout!r} reads {_layout(config)}")
    if config.layout == "list":
        entries, classes = _read_list(config, split)
    elif config.layout == "csv":
        entries, classes = _read_csv(config, split)
    else:
        entries, classes = _read_folders(config, split)
    where = folder if config.layout == "folders" else listed
    if not entries:
        raise DataError(f"{where}: it lists no video; data.layout {config.layout!r} reads {_layout(config)}")
    if len(classes) < 2:
        raise DataError(f"{where}: all videos are of one class ({classes[0]}): there is nothing to tell apart")
    return _sorted_out(config, where, folder, entries, classes)


def _layout(config: KineticsDataConfig) -> str:
    if config.layout == "folders":
        return f"ROOT/{config.train_videos}/<class>/*.mp4 and ROOT/{config.val_videos}/<class>/*.mp4"
    line = "lines `path label`" if config.layout == "list" else f"columns {','.join(_COLUMNS)}"
    return (
        f"ROOT/{config.train_list} and ROOT/{config.val_list} ({line}) for the videos under "
        f"ROOT/{config.train_videos} and ROOT/{config.val_videos}; every name is a field of `data`"
    )


def _sorted_out(
    config: KineticsDataConfig,
    where: Path,
    folder: Path,
    entries: list[tuple[tuple[str, ...], int]],
    classes: list[str],
) -> VideoList:
    """Split what is listed into what is there and what is missing."""
    listing = Listing()
    paths, labels, missing = [], [], []
    for candidates, label in entries:
        found = next((path for path in candidates if listing.has(os.path.join(folder, path))), None)
        if found is None:
            missing.append(candidates[0])
        else:
            paths.append(os.path.join(folder, found))
            labels.append(label)
    if len(missing) > config.missing_share * len(entries) or not paths:
        shown = "\n".join(f"  {path}" for path in missing[:_SHOWN])
        raise DataError(
            f"{where}: {len(missing)} of {len(entries)} videos are not in {folder}, {config.missing_share:.1%} are tolerated "
            f"(data.missing_share); the first:\n{shown}"
        )
    text = "\n".join(f"{candidates[0]} {label}" for candidates, label in entries)
    digest = hashlib.sha256("\n".join([*classes, "", text]).encode()).hexdigest()
    return VideoList(paths, labels, classes, missing, digest)


def _read_list(config: KineticsDataConfig, split: str) -> tuple[list[tuple[tuple[str, ...], int]], list[str]]:
    file = config.paths(split)[0]
    entries: list[tuple[tuple[str, ...], int]] = [((path,), label) for path, label in _lines(file)]
    if config.class_names:
        names = Path(config.root).expanduser() / config.class_names
        classes = [line.strip() for line in _text(names).splitlines() if line.strip()]
        if len(set(classes)) < len(classes):
            raise DataError(f"{names}: it names a class twice; expected each class once, one per line")
        if config.num_classes not in (None, len(classes)):
            raise DataError(f"data.num_classes is {config.num_classes}, but {names} names {len(classes)} classes")
    else:
        # Both splits take the training list's count, so that they agree.
        count = config.num_classes or 1 + max((label for _, label in _lines(config.paths("train")[0])), default=-1)
        classes = [str(number) for number in range(count)]
    for number, (paths, label) in enumerate(entries, 1):
        if not 0 <= label < len(classes):
            raise DataError(
                f"{file}: video {number}, {paths[0]}, has the label {label}, outside of the {len(classes)} classes "
                f"0..{len(classes) - 1}"
            )
    return entries, classes


def _lines(file: Path) -> list[tuple[str, int]]:
    found = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.lstrip("-").isdecimal():
            raise DataError(f"{file}: line {number} is {line.strip()!r}: `path label` with a whole number is expected")
        found.append((path.strip(), int(label)))
    return found


def _read_csv(config: KineticsDataConfig, split: str) -> tuple[list[tuple[tuple[str, ...], int]], list[str]]:
    # The classes of both splits are those of the training file, by name.
    classes = sorted({row["label"] for row in _rows(config.paths("train")[0])})
    numbers = {name: number for number, name in enumerate(classes)}
    file = config.paths(split)[0]
    entries = []
    for number, row in enumerate(_rows(file), 2):
        if row["label"] not in numbers:
            raise DataError(
                f"{file}: line {number} has the class {row['label']!r}, which the training file does not have"
            )
        try:
            start, end = round(float(row["time_start"])), round(float(row["time_end"]))
        except ValueError:
            raise DataError(
                f"{file}: line {number} has the times {row['time_start']!r} and {row['time_end']!r}: seconds are expected"
            ) from None
        stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        folders = ("", row["label"] + "/", row["label"].replace(" ", "_") + "/")
        entries.append(
            (tuple(f"{folder}{stem}{suffix}" for folder in folders for suffix in EXTENSIONS), numbers[row["label"]])
        )
    return entries, classes


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; the classes are those of the training split")
    reader = csv.DictReader(_text(file).splitlines())
    absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if absent:
        raise DataError(
            f"{file}: it has no column {', '.join(absent)}; {', '.join(_COLUMNS)} are expected in the first line"
        )
    rows = list(reader)
    short = next((number for number, row in enumerate(rows, 2) if any(row[name] is None for name in _COLUMNS)), None)
    if short:
        raise DataError(f"{file}: line {short} has fewer columns than the first")
    return rows


def _read_folders(config: KineticsDataConfig, split: str) -> tuple[list[tuple[tuple[str, ...], int]], list[str]]:
    train, folder = config.paths("train")[1], config.paths(split)[1]
    if not train.is_dir():
        raise DataError(f"{train}: there is no such folder; the classes are those of the training split")
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith("."))
    numbers = {name: number for number, name in enumerate(classes)}
    entries: list[tuple[tuple[str, ...], int]] = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")):
        if name not in numbers:
            raise DataError(f"{folder / name}: the training split in {train} has no such class")
        files = sorted(os.listdir(folder / name))
        entries += [((f"{name}/{file}",), numbers[name]) for file in files if file.lower().endswith(EXTENSIONS)]
    return entries, classes


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: it cannot be read: {error}") from error
