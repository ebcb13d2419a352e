"""Define the error for what a user can get wrong about a head."""


class HeadError(ValueError):
    """A head cannot be built, or its weights do not fit: says which field, what was found, what to do."""
