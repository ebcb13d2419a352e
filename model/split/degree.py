"""Say over how many processes a base network can be split. Imports no torch: a recipe is checked before anything is loaded."""

from __future__ import annotations

import math

from permafrost.model.errors import BackboneError
from permafrost.model.spec import SWINV2_SIZES, SwinV2Size

SPLIT_STAGES = (2, 3)
"""0-based stages whose weights are split. They hold 98.6 % of the giant's; the others are on every process."""


def possible_degrees(size: SwinV2Size) -> list[int]:
    """Return the degrees that split the heads of every split stage evenly, 1 first."""
    common = math.gcd(*(size.num_heads[stage] for stage in SPLIT_STAGES))
    return [degree for degree in range(1, common + 1) if common % degree == 0]


def check_tensor_degree(name: str, degree: int, size: SwinV2Size | None = None) -> None:
    """Check that a base network can be split over a tensor group of this degree.

    Args:
        name: name of the network, in the table of sizes unless `size` is given.
        degree: processes of a group; 1 splits nothing and fits every network.
        size: the network's row; None looks the name up.

    Raises:
        BackboneError: if the degree is below 1, the network is no SwinV2, or its heads do not divide.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise BackboneError(f"A tensor group has at least 1 process, found {degree!r}.")
    if degree == 1:
        return
    size = SWINV2_SIZES.get(name) if size is None else size
    if size is None:
        raise BackboneError(
            f"{name} cannot be split over a tensor group of {degree}: only SwinV2 can ({', '.join(SWINV2_SIZES)}). "
            "Use tensor degree 1; the other processes then hold copies."
        )
    degrees = possible_degrees(size)
    if degree not in degrees:
        heads = " and ".join(str(size.num_heads[stage]) for stage in SPLIT_STAGES)
        stages = " and ".join(str(stage + 1) for stage in SPLIT_STAGES)
        raise BackboneError(
            f"{name} has {heads} heads in stages {stages}, which a tensor degree of {degree} does not divide; possible "
            f"degrees are {', '.join(map(str, degrees))}."
        )
