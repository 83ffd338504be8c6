"""Opening the repository's files, in the place of which anything may lie."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_plain(path: Path) -> BufferedReader:
    """Opens a plain file for reading.

    Raises:
        OSError: It cannot be opened, or it is a link, which could lead out of the repository, a
            folder or a device.
    """
    file = open(path, "rb", opener=_open_no_link)  # noqa: SIM115  # the caller closes it
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "expected a plain file")
    except BaseException:
        file.close()
        raise
    return file


def _open_no_link(path: str, flags: int) -> int:
    try:
        # Not blocking, so that a pipe in the place of the file cannot hold up the server.
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "expected a plain file, got a link") from None
        raise
