"""The few errors that blobpipe raises itself.

Each message is one line: the file, what was found, what was expected, what to do.
"""


class BlobpipeError(Exception):
    """Anything wrong that the user can mend; the command line prints it as one line."""

    def __str__(self) -> str:
        """The message, whatever names it holds, as text that can be printed and stored."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """Escape line ends, control characters, and the bytes of names in another encoding."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    )


def internal_fault(error: Exception) -> str:
    """Say in one line that something is nobody's fault but blobpipe's."""
    return (
        f"internal fault ({type(error).__name__}: {printable(str(error))[:120]}): please report it"
    )


class FrameError(BlobpipeError):
    """An image that cannot be used. In a folder of many, it is rejected and the rest go on."""


class TableError(BlobpipeError):
    """A CSV table that does not hold what it must."""


class ParamsError(BlobpipeError):
    """A parameter file with an unknown key, a wrong type or a value out of range."""


class ExtraError(BlobpipeError):
    """An optional stage without the packages that it needs."""


class ModelError(BlobpipeError):
    """A model file that is missing, damaged, or of another network."""


class LogError(BlobpipeError):
    """A log of the daily routine that cannot be opened, or was asked for what it does not hold."""


class ArchiveError(BlobpipeError):
    """The archive of exposures does not answer, or not with what was asked for."""


class NoticeError(BlobpipeError):
    """A notice that cannot be sent with the settings and the environment as they are."""


class ServeError(BlobpipeError):
    """A server that could not be started safely."""
