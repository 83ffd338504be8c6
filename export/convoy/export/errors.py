"""The errors of an export.

    ExportError              base: the message is one line for the user
    ├── InputError           a file, folder or flag of the caller is unusable
    ├── UnsupportedNetError  a format's exporter cannot express the net
    ├── ParityError          the outputs of an artifact differ from those of the eager net
    └── PublishError         the version could not be written to the model repository

An InputError exits with code 2, every other one with 1; none changes the repository.
"""

import re


class ExportError(Exception):
    """Base of the errors that `export` raises."""


class InputError(ExportError):
    """A file, folder or flag is missing, unreadable, or contradicts another one."""


class UnsupportedNetError(ExportError):
    """A format's exporter cannot express the net."""


class ParityError(ExportError):
    """An artifact failed its gate; the message names the sample, the batch size and the limit."""


class PublishError(ExportError):
    """The version cannot be written: permissions, space, or a damaged repository entry."""


_FAILED_NODE = re.compile(
    r"while running (?P<kind>\w+) node\. Name:'(?P<name>[^']*)'"
    r"(?: Status Message: (?P<reason>.*))?",
    re.DOTALL,
)


def runtime_reason(error: BaseException) -> str:
    """Return in one line why a runtime failed, with the node if ONNX Runtime names one."""
    found = _FAILED_NODE.search(str(error))
    if not found:
        return one_line(error)
    reason = " ".join((found["reason"] or "").split())[:200]
    return f"node {found['name']!r} ({found['kind']}) fails: {reason or 'no reason given'}"


def one_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
