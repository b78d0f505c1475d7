"""Errors that basin_lens raises on purpose. Each says what was expected, what came, and what to do."""


class BasinLensError(ValueError):
    """Base of every error that basin_lens raises on purpose."""


class ModelError(BasinLensError):
    """The model cannot be loaded, or is of a kind that basin_lens does not measure."""


class TextError(BasinLensError):
    """A text is empty, too short, missing or unreadable."""


class CaptureError(BasinLensError):
    """States cannot be captured, or a capture does not fit the model or the request."""


class AnalyzerError(BasinLensError):
    """An analyzer declares what cannot be, measures other than it declares, or its own code fails; the class is named."""


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
    """Bytes cannot be coded or decoded; the classes below say what is wrong with a file."""


class UnknownFileError(CodecError):
    """The bytes are not a file of the codec."""


class FileVersionError(CodecError):
    """The file is of a version of the format that this basin_lens does not read."""


class WrongModelError(CodecError):
    """The file was written with another model or tokenizer."""


class WrongEnvironmentError(CodecError):
    """The model computes other numbers here than where the file was written."""


class TruncatedFileError(CodecError):
    """The file ends too early."""


class CorruptFileError(CodecError):
    """The file's bytes were changed; `chunk` is the number of the changed chunk, None for the header or the whole."""

    def __init__(self, message: str, chunk: int | None = None) -> None:
        super().__init__(message)
        self.chunk = chunk


class MergeError(BasinLensError):
    """Tokens cannot be merged as asked."""


class BankWarning(UserWarning):
    """Neighbors come from texts that say more of a template than of a token. A warning: the numbers are what was asked for."""


class CompileWarning(UserWarning):
    """A block that was to be compiled is not. A warning: the numbers are what was asked for, and take longer."""


class MergeWarning(UserWarning):
    """A merger took more memory than it saved. A warning: the numbers are what was asked for."""


class PieceWarning(UserWarning):
    """A damaged piece of a run was made again. A warning: the numbers are what was asked for."""
