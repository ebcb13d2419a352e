"""Define the base of the configurations of all heads: values only, no torch. `heads.build.build_head` makes the live head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from permafrost._configuration import Configuration


@dataclass
class HeadConfig(Configuration):
    """Describe a head.

    The configuration of a head from outside this package builds it by a method of its own:

        def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> Head

    It is called with the backbone's maps and the names of the K classes in the order of the labels, and raises HeadError where the
    head takes other maps or other classes. A subclass of one of the configurations here needs it, too: none builds its parent.
    """

    task: ClassVar[str]
    """Name of the task; the head learns from data of the same one."""

    def check_data(self, data: Any) -> None:
        """Raise HeadError if data of the right task lack what this head learns from; by default every head is content.

        Args:
            data: the configuration of the data.
        """
