"""Server addresses: validation, and the gRPC target for one or several servers.

HOST:PORT               one server; the name may have several IP addresses
HOST:PORT,HOST:PORT     several servers; names are resolved once, when the channel opens
SCHEME:…                a target of gRPC's own (dns, unix, ipv4, ipv6, xds, …)
"""

import ipaddress
import re
import socket
from collections.abc import Iterator

import grpc

from convoy.client.errors import UnavailableError, UsageError

_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|passthrough):")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/\s,]+):(?P<port>\d+)")
_LARGEST_PORT = 65535


def check_address(address: str) -> None:
    """Check the form of an address and the range of its ports.

    Raises:
        UsageError: It is malformed.
    """
    scheme = _SCHEME.match(address)
    if scheme and scheme[1] not in ("ipv4", "ipv6"):
        if scheme[1] == "dns" and (port := re.search(r":(\d+)$", address)):
            _check_port(address, port[1])
        return
    for part in address[scheme.end() if scheme else 0 :].split(","):
        match = _HOST_AND_PORT.fullmatch(part)
        if not match:
            raise UsageError(
                "address: expected HOST:PORT, HOST:PORT,HOST:PORT or dns:///NAME:PORT, "
                f"got {address!r}"
            )
        _check_port(address, match["port"])


def grpc_target(address: str) -> str:
    """Return the target to open a channel to; resolve the names in a list of several servers.

    Raises:
        UnavailableError: None of several names can be resolved.
    """
    if "," not in address or _SCHEME.match(address):
        return address
    endpoints = list(dict.fromkeys(_endpoints(address)))
    if not endpoints:
        raise UnavailableError(
            f"{address}: none of the names can be resolved", grpc.StatusCode.UNAVAILABLE
        )
    families = {ip.version for ip, _ in endpoints}
    if families == {4}:
        return "ipv4:" + ",".join(f"{ip}:{port}" for ip, port in endpoints)
    # One target has one family: IPv4 addresses take their IPv6-mapped form.
    mapped = (f"[::ffff:{ip}]:{p}" if ip.version == 4 else f"[{ip}]:{p}" for ip, p in endpoints)
    return "ipv6:" + ",".join(mapped)


def is_local(address: str) -> bool:
    """Tell whether an address stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    scheme = _SCHEME.match(address)
    parts = address[scheme.end() if scheme else 0 :].lstrip("/").split(",")
    return all(_is_loopback(part.rpartition(":")[0].strip("[]")) for part in parts)


def has_several_names(address: str) -> bool:
    """Tell whether the address lists several servers, of which one at least is a name."""
    if "," not in address or _SCHEME.match(address):
        return False
    return not all(
        map(_is_ip, (part.rpartition(":")[0].strip("[]") for part in address.split(",")))
    )


def _endpoints(
    address: str,
) -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    for part in address.split(","):
        host, _, port = part.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError:
            continue
        for *_, endpoint in found:
            yield ipaddress.ip_address(str(endpoint[0]).partition("%")[0]), int(port)


def _check_port(address: str, port: str) -> None:
    if not 1 <= int(port) <= _LARGEST_PORT:
        raise UsageError(f"address: expected a port from 1 to {_LARGEST_PORT}, got {address!r}")


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_ip(host) and ipaddress.ip_address(host).is_loopback)
