"""The CUDA sources of window attention compiled by g++, with the emulated warp, and called."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import Case
from torch import Tensor

from permafrost.model.kernels.window_attention.cuda import SOURCES, Arguments, Plan, describe_launch, plan

FOLDER = Path(__file__).parent / "emulator"


class Launch(ctypes.Structure):
    """Fields of `struct Launch`."""

    _fields_ = [("threads", ctypes.c_int), ("parts", ctypes.c_int), ("shared_bytes", ctypes.c_int)]


class Map(ctypes.Structure):
    """Fields of `struct Map`."""

    _fields_ = [(name, ctypes.c_int) for name in ("height", "width", "down", "across", "shift")]


class Place(ctypes.Structure):
    """Fields of `struct Place`."""

    _fields_ = [
        ("place", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("y", "x", "origin", "is_padding", "query_entry", "key_entry")),
    ]


class Emulator:
    """A library of kernels.

    Args:
        plans: What it has.
        folder: Where it is built.
    """

    def __init__(self, plans: Sequence[Plan], folder: Path) -> None:
        self._names = {one: f"kernel_{number}" for number, one in enumerate(plans)}
        builds = " ".join(f"X({name}, {one.config})" for one, name in self._names.items())
        library = folder / "emulated.so"
        subprocess.run(
            [
                "g++",
                "-std=c++17",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unknown-pragmas",
                "-Wno-clobbered",
                "-shared",
                "-fPIC",
            ]
            + ["-DEMULATED_WARP", f"-DBUILDS={builds}", f"-I{SOURCES}", f"-I{FOLDER}", "-o", library]
            + [FOLDER / "window_attention.cpp"],
            check=True,
        )
        self.library = ctypes.CDLL(str(library))

    def describe(self, chosen: Plan) -> Launch:
        describe = self.library[f"describe_{self._names[chosen]}"]
        describe.restype = Launch
        return describe()

    def run(
        self,
        chosen: Plan,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        out: Tensor,
        *,
        window: int,
        shift: int,
        blocks: tuple[int, int] | None = None,
    ) -> None:
        """Runs blocks `first` to `first + number` of the grid: all, unless given."""
        grid, arguments = describe_launch(chosen, *tensors, out, window=window, shift=shift)
        first, number = blocks or (0, grid)
        run = self.library[f"run_{self._names[chosen]}"]
        run.argtypes = [ctypes.POINTER(Arguments), ctypes.c_longlong, ctypes.c_longlong]
        run(ctypes.byref(arguments), first, number)

    def places(self, window: int, of: Map) -> list[Place]:
        """Return what every token of every window of a map is."""
        places = (Place * (of.down * of.across * window**2))()
        assert self.library.find_places(window, ctypes.byref(of), places)
        return list(places)


def plan_of(case: Case) -> Plan:
    """The build that a case takes."""
    return plan(getattr(torch, case.dtype), case.window, case.head_dim, case.num_heads, cosine=case.cosine)
