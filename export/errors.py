"""What can go wrong while a model is exported.

    ExportError              base: the message is one line for the user
    ├── InputError           a file, folder or flag of the caller's is not usable
    ├── UnsupportedNetError  a format's exporter cannot express the net
    ├── ParityError          an artefact does not compute what the eager net computes
    └── PublishError         the model repository could not take the version

An InputError exits with status 2, every other one with 1; none leaves anything in the repository.
"""


class ExportError(Exception):
    """Base of everything that `export` raises on purpose."""


class InputError(ExportError):
    """A file, folder or flag is missing, unreadable or contradicts another."""


class UnsupportedNetError(ExportError):
    """A format's exporter cannot express the net."""


class ParityError(ExportError):
    """An artefact failed its gate; the message names the sample, the batch size and the gate."""


class PublishError(ExportError):
    """The model repository refused the version: rights, space, or a damaged entry."""


def one_line(error: BaseException) -> str:
    """Returns the first line of what another library's error says, for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
