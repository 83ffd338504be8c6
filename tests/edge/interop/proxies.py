"""Reverse proxies in front of a server's addresses, on loopback."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.edge.interop.clients import Targets

START_TIMEOUT_S = 30

_NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 0;
  server {{ listen {edge} http2; location / {{ grpc_pass grpc://{to.edge}; }} }}
  server {{ listen {waiting} http2; location / {{ grpc_pass grpc://{to.waiting}; }} }}
  server {{
    listen {secure} ssl http2;
    ssl_certificate {to.certificate};
    ssl_certificate_key {to.key};
    ssl_client_certificate {to.ca};
    ssl_verify_client on;
    location / {{
      grpc_pass grpcs://{to.secure};
      grpc_ssl_certificate {to.certificate};
      grpc_ssl_certificate_key {to.key};
      grpc_ssl_trusted_certificate {to.ca};
      grpc_ssl_verify on;
      grpc_ssl_name 127.0.0.1;
    }}
  }}
}}
"""

_HAPROXY = """
defaults
  mode http
  timeout connect 10s
  timeout client 120s
  timeout server 120s

listen edge
  bind {edge} proto h2
  server convoy {to.edge} proto h2

listen waiting
  bind {waiting} proto h2
  server convoy {to.waiting} proto h2

listen secure
  bind {secure} ssl crt {folder}/pair.pem ca-file {to.ca} verify required alpn h2
  server convoy {to.secure} ssl crt {folder}/pair.pem ca-file {to.ca} verify required alpn h2
"""


@contextlib.contextmanager
def nginx(targets: Targets, folder: Path) -> Iterator[Targets]:
    """Run nginx with `grpc_pass` in front of the targets; its TLS listener wants mutual TLS too."""
    before, config = _configure(_NGINX, targets, folder)
    with _running(["nginx", "-p", str(folder), "-c", str(config)], before, folder):
        yield before


@contextlib.contextmanager
def haproxy(targets: Targets, folder: Path) -> Iterator[Targets]:
    """Run haproxy in front of the targets; its TLS listener wants mutual TLS too."""
    pair = targets.certificate.read_bytes() + targets.key.read_bytes()
    (folder / "pair.pem").write_bytes(pair)
    before, config = _configure(_HAPROXY, targets, folder)
    with _running(["haproxy", "-db", "-f", str(config)], before, folder):
        yield before


def _configure(template: str, targets: Targets, folder: Path) -> tuple[Targets, Path]:
    edge, waiting, secure = (f"127.0.0.1:{port}" for port in _free_ports(3))
    config = folder / "proxy.conf"
    config.write_text(
        template.format(edge=edge, waiting=waiting, secure=secure, to=targets, folder=folder)
    )
    return replace(targets, edge=edge, waiting=waiting, secure=secure), config


@contextlib.contextmanager
def _running(command: list[str], targets: Targets, folder: Path) -> Iterator[None]:
    program = shutil.which(command[0], path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        pytest.skip(f"needs {command[0]} (Debian package {command[0]})")
    with (
        (folder / "output.txt").open("w+") as output,
        subprocess.Popen([program, *command[1:]], stdout=output, stderr=output) as process,
    ):
        try:
            for address in (targets.edge, targets.waiting, targets.secure):
                _wait_for(address, process, folder / "output.txt")
            yield
        finally:
            process.terminate()


def _wait_for(address: str, process: subprocess.Popen[bytes], output: Path) -> None:
    host, port = address.split(":")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, output.read_text()
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s, f"{address} did not open"
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in opened]
