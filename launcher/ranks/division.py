"""Numbers that must divide: the global batch over processes, the processes into tensor groups. Imports no torch."""

from __future__ import annotations

from permafrost.launcher.errors import LaunchError


def micro_batch_size(*, global_batch: int, world_size: int, accumulation: int) -> int:
    """Return how many images one forward on one rank takes.

    Raises:
        LaunchError: the global batch does not divide.
    """
    size, rest = divmod(global_batch, world_size * accumulation)
    if rest or not size:
        raise LaunchError(
            f"loop.global_batch {global_batch} does not divide over {world_size} process(es) x engine.accumulation "
            f"{accumulation}: take a multiple of {world_size * accumulation}, or change either of the two"
        )
    return size


def require_mesh(*, world_size: int, tensor: int) -> None:
    """Check that the world divides into tensor groups.

    Raises:
        LaunchError: naming the numbers that would fit.
    """
    if world_size % tensor:
        raise LaunchError(
            f"mesh.tensor is {tensor} but there are {world_size} process(es), which do not divide into groups "
            f"of {tensor}: start a multiple of {tensor}, or set mesh.tensor to 1"
        )
