"""Errors of a run that a user can mend: the command line prints them without a traceback and exits with 2."""

from permafrost.data.errors import DataError
from permafrost.heads.errors import HeadError
from permafrost.model.errors import BackboneError, WeightsError


class RecipeError(ValueError):
    """A recipe or one of its fields does not exist, or its fields contradict each other."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another head or backbone."""


class RunFolderError(ValueError):
    """A run folder cannot be used: it holds another recipe's run, or none where one must be, or is not writable."""


class LaunchError(ValueError):
    """Processes, devices or engines do not fit together: says which variable or file, and what would."""


class OutOfDeviceMemory(ValueError):
    """A device is too small for the recipe: says what it is estimated to need, and what would need less."""


class TrainingStopped(RuntimeError):
    """Training stopped because the loss was not finite; of a head, several times in a row, raised when all else is done.

    Not a mistake in the input, hence not among USER_ERRORS: the command line prints it without a traceback and exits
    with 1.
    """


class Interrupted(RuntimeError):
    """A signal asked the run to end, and it has been saved. The same command goes on from there.

    Not among USER_ERRORS: the command line prints it without a traceback and exits with a code of its own.
    """


class RankLost(RuntimeError):
    """Another rank died, stopped or hung, so this one cannot go on. Says which one, and what it was doing.

    Not among USER_ERRORS: the command line prints it without a traceback, as the cause is elsewhere, and exits with 1.
    """


USER_ERRORS = (
    BackboneError,
    WeightsError,
    DataError,
    HeadError,
    RecipeError,
    CheckpointError,
    RunFolderError,
    LaunchError,
    OutOfDeviceMemory,
)
