"""Errors that basin_lens raises on purpose. Each says what was expected, what came, and what to do."""


class BasinLensError(ValueError):
    """Base of every error that basin_lens raises on purpose."""


class ModelError(BasinLensError):
    """The model cannot be loaded, or is of a kind that basin_lens does not measure."""


class TextError(BasinLensError):
    """A text is empty, too short, missing or unreadable."""


class CaptureError(BasinLensError):
    """States cannot be captured, or a capture does not fit the model or the request."""


class NeighborError(BasinLensError):
    """Neighbors cannot be found as asked."""


class TransportError(BasinLensError):
    """A state cannot be passed through a block exactly."""


class TableError(BasinLensError):
    """A table lacks something, or would be ambiguous."""


class StudyError(BasinLensError):
    """A study cannot be run as asked."""


class StoreError(BasinLensError):
    """Something cannot be read from or written to disk."""


class CodecError(BasinLensError):
    """Bytes cannot be coded or decoded."""


class MergeError(BasinLensError):
    """Tokens cannot be merged as asked."""
