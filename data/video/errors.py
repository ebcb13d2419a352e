"""The error of one video file. Imports nothing: decoding processes start with it."""


class VideoError(ValueError):
    """One video file cannot be used. Training replaces it; evaluation counts it and leaves it out."""
