"""What a user can get wrong about a data set."""


class DataError(ValueError):
    """A data set is missing, malformed or too damaged to train on: says which file, what was expected, what to do."""
