"""`permafrost convert`: turn weights of any known format into sharded safetensors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import parse

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(argv: Sequence[str]) -> int:
    """Convert; returns 0."""
    parser = argparse.ArgumentParser(
        prog="permafrost convert",
        description="Read weights of any known format (official, SimMIM, EsViT, detection code, timm, Hugging Face; .pth "
        "or safetensors), say what they are, and write sharded safetensors with a manifest.",
    )
    parser.add_argument("input", metavar="IN", help="a file, a folder, an index file, or the name of known weights")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="dtype to write the weights in; keep (the default) leaves them as they are",
    )
    parser.add_argument(
        "--max-shard-size",
        type=num_bytes,
        default=num_bytes("2GB"),
        metavar="SIZE",
        help="largest size of one file, for example 500MB or 2GiB (default: 2GB)",
    )
    parser.add_argument(
        "--prefix", metavar="TEXT", help="take only tensors whose names start with this, and strip it from them"
    )
    parser.add_argument(
        "--weights-key", metavar="KEY", help="entry of a PyTorch checkpoint that holds the weights, such as `student`"
    )
    for name, what in (
        ("--window-size", "window size in training"),
        ("--pretrained-window-size", "window size that scales the position bias's coordinates"),
    ):
        help_text = f"{what}, one number or four, if the file does not give it"
        parser.add_argument(name, type=int, nargs="+", metavar="W", help=help_text)
    options = parse(parser, argv)

    from permafrost.launcher.exchange.convert import convert

    convert(
        options.input,
        options.output,
        dtype=None if options.dtype == "keep" else options.dtype,
        max_shard_bytes=options.max_shard_size,
        prefix=options.prefix,
        weights_key=options.weights_key,
        window_size=options.window_size and tuple(options.window_size),
        pretrained_window_size=options.pretrained_window_size and tuple(options.pretrained_window_size),
    )
    return 0


def num_bytes(text: str) -> int:
    """Return the bytes of a size such as 500MB, 2GiB or 1000000 for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give for example 500MB or 2GiB")
    return size
