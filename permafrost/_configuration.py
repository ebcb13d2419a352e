"""Define what all configurations have in common: a misspelt field is refused, wherever it is set."""

from __future__ import annotations

import dataclasses
from typing import Any

from permafrost._nearest import did_you_mean


class Configuration:
    """Base of the dataclasses that describe a run. It has no fields of its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field.

        Raises:
            AttributeError: there is no such field; `experiment.loop.num_step = 100` would else change nothing, in silence.
        """
        fields = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]  # of a subclass
        if name not in fields:
            raise AttributeError(f"{type(self).__name__} has no field {name}: {did_you_mean(name, fields)}")
        object.__setattr__(self, name, value)
