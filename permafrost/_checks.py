"""Check configurations' values: a failure is one sentence, "<field> is <value>: <remedy>". Every package may use them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checks:
    """Checks that raise one package's error; `place`, "data.", and `prefix`, "rpn.", stand before the fields' names in the message."""

    error: type[ValueError]
    place: str = ""

    def require(self, condition: bool, name: str, value: object, remedy: str) -> None:
        """Raise the error unless the condition holds."""
        if not condition:
            raise self.error(f"{self.place}{name} is {value!r}: {remedy}")

    def within(
        self, config: object, prefix: str, *names: str, low: float, high: float = float("inf"), remedy: str
    ) -> None:
        """Raise the error unless each of these fields lies within low..high."""
        for name in names:
            self.require(low <= getattr(config, name) <= high, prefix + name, getattr(config, name), remedy)

    def counts(self, prefix: str, config: object, *names: str, least: int = 1) -> None:
        """Raise the error unless each of these fields is at least `least`."""
        for name in names:
            value = getattr(config, name)
            self.require(value >= least, prefix + name, value, f"it must be at least {least}")

    def positive(self, prefix: str, config: object, *names: str) -> None:
        """Raise the error unless each of these fields is above 0."""
        for name in names:
            self.require(getattr(config, name) > 0, prefix + name, getattr(config, name), "it must be above 0")

    def not_negative(self, prefix: str, config: object, *names: str) -> None:
        """Raise the error if one of these fields is negative."""
        for name in names:
            self.require(getattr(config, name) >= 0, prefix + name, getattr(config, name), "it cannot be negative")

    def shares(self, prefix: str, config: object, *names: str) -> None:
        """Raise the error unless each of these fields is above 0 and at most 1."""
        for name in names:
            value = getattr(config, name)
            self.require(0.0 < value <= 1.0, prefix + name, value, "give a share above 0 and at most 1")
