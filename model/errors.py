"""Define the errors a user of the base network can meet; each says what was found, where, what was expected and what to do."""

from __future__ import annotations


class BackboneError(ValueError):
    """A base network was asked for, or called, in a way that cannot work."""


class WeightsError(BackboneError):
    """A weights file is missing, unreadable, or does not belong to the base network it was given to."""


class KernelError(BackboneError):
    """A kernel was asked for by name that cannot run here, or not on these tensors."""
