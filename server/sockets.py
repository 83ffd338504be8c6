"""Taking a TCP port."""

import socket

# Connections that may wait to be taken up; the kernel may allow fewer.
_BACKLOG = 2048


def open_port(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Returns a socket that listens.

    Args:
        host: An IPv4 or IPv6 address, or a name.
        port: 0 for a free one.
        shared: Whether other sockets may take the same port; the kernel spreads connections then.

    Raises:
        OSError: The port is in use or not permitted.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)
