"""The errors that users meet. Each message names the file or key, the value found, and the remedy."""


class MedAlignError(Exception):
    """Base of every error that medalign raises for a user's input; the command prints it without a traceback."""


class ConfigError(MedAlignError):
    """A setting is unknown, ill-typed, or contradicts another one."""


class DataError(MedAlignError):
    """A shard, an index or a sample cannot be used."""


class CheckpointError(MedAlignError):
    """A checkpoint or an export cannot be written or read."""


class KernelError(MedAlignError):
    """A requested kernel implementation cannot run on these inputs or on this machine."""


class DivergedError(MedAlignError):
    """A loss or a gradient is no longer a number."""


def plain(error: OSError) -> str:
    """The file and what the system says of it, without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


_LIBRARY = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,  # and RecursionError, NotImplementedError
    SyntaxError,
    TypeError,
    ValueError,
)


def from_library(error: BaseException | None, *more: type[Exception]) -> bool:
    """Whether an error is what a library raises for input that it cannot use; `more` are the library's own classes.

    Libraries written in Rust, such as tokenizers, raise errors that have no class of their own.
    """
    return isinstance(error, (*_LIBRARY, *more)) or type(error) is Exception
