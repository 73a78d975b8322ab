"""Exceptions for invalid user input. Each message names the file or setting, the value found, and the remedy."""

USER_ERROR = 2  # exit status after an error that the user can correct
INTERRUPTED = 130  # 128 + 2, the status of a process that Ctrl-C ended


class MedAlignError(Exception):
    """Base class of the exceptions for invalid user input. The command line prints them without a traceback."""


class ConfigError(MedAlignError):
    """A setting is unknown, has the wrong type or range, or contradicts another one."""


class RunInUse(ConfigError):
    """Another training uses the run's folder."""


class DataError(MedAlignError):
    """A shard, an index or a sample cannot be used."""


class CheckpointError(MedAlignError):
    """A checkpoint or an export cannot be written or read."""


class KernelError(MedAlignError):
    """A requested kernel implementation cannot run on these inputs or on this machine."""


class DivergedError(MedAlignError):
    """A loss or a gradient is not finite."""


class Stopped(MedAlignError):
    """A signal asked the run to end, and its checkpoint is written: the same command again continues it.

    Attributes:
        status: exit status of the process.
    """

    status = 1


class Preempted(Stopped):
    """USR1 asked the run to end, and to be started again."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class Terminated(Stopped):
    """TERM asked the run to end."""

    status = 143  # 128 + 15, the status of a process that TERM ended


def exit_status(error: BaseException) -> int:
    """Return the exit status of a process that an exception ends: 2 if the user can correct the reason, 1 if not."""
    if isinstance(error, Stopped):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ConnectionError):  # another process, such as a worker of the loader, has ended
        return 1
    return USER_ERROR if isinstance(error, (MedAlignError, OSError)) else 1


def format_os_error(error: OSError) -> str:
    """Return the file name and the message of the operating system, without the error number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


_LIBRARY = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,  # includes RecursionError and NotImplementedError
    SyntaxError,
    TypeError,
    ValueError,
)


def from_library(error: BaseException | None, *more: type[Exception]) -> bool:
    """Return whether an exception is one that a library raises for invalid input.

    Libraries written in Rust, such as tokenizers, raise plain Exception.

    Args:
        error: the exception, or None.
        more: the library's own exception classes.
    """
    return isinstance(error, (*_LIBRARY, *more)) or type(error) is Exception
