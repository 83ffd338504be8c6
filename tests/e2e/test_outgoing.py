"""The commands contact nobody and write only to named folders, as the kernel sees it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.image_files import encode, photograph
from tests.needs import needs_program

pytestmark = [needs_program("strace", "strace"), pytest.mark.slow, pytest.mark.timeout(1200)]

_CALLS = "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2"
_ADDRESS = re.compile(
    r"sin6?_port=htons\((\d+)\).*?(?:inet_addr\(\"|inet_pton\(AF_INET6, \")([^\"]+)\""
)
# openat(AT_FDCWD</work>, "name", O_RDWR...) and mkdir("name", 0777); of a rename the target.
_OPENED = re.compile(r"(?:open|openat|creat)\((?:[^<,\"]*<([^>]*)>, )?\"([^\"]*)\"(.*)")
_MADE = re.compile(r"mkdir(?:at)?\((?:[^<,\"]*<([^>]*)>, )?\"([^\"]*)\"")
_RENAMED = re.compile(r"rename(?:at|at2)?\(.*?\".*?\", (?:[^<,\"]*<([^>]*)>, )?\"([^\"]*)\"")
_DNS_PORT = 53
_DEVICES = (Path("/dev"), Path("/proc"))


@dataclass(frozen=True)
class Trace:
    """What a command and its children did.

    Attributes:
        contacts: Addresses that they connected or sent to, "HOST:PORT".
        written: Files that they opened for writing, made, or renamed something to.
    """

    contacts: frozenset[str]
    written: frozenset[Path]

    @classmethod
    def read(cls, text: str, folder: Path) -> "Trace":
        """Read strace's output; `folder` is where the command ran."""
        contacts, written = set(), set()
        for line in text.splitlines():
            if found := _ADDRESS.search(line):
                contacts.add(f"{found[2]}:{found[1]}")
            elif path := _written(line):
                written.add(Path(os.path.normpath(folder / path)))
        return cls(frozenset(contacts), frozenset(written))

    def strangers(self) -> list[str]:
        """Return the contacts beyond this machine, and look-ups of names."""
        return sorted(c for c in self.contacts if not _is_here(*c.rsplit(":", 1)))

    def outside(self, folders: Sequence[Path]) -> list[str]:
        """Return what was written neither inside of folders nor as a folder around one."""
        allowed = (*folders, *_DEVICES)
        return sorted(
            str(path)
            for path in self.written
            if not any(path.is_relative_to(f) or f.is_relative_to(path) for f in allowed)
        )


def _is_here(host: str, port: str) -> bool:
    address = ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback and int(port) != _DNS_PORT


def _written(line: str) -> Path | None:
    if "= -1 " in line:
        return None
    if found := _OPENED.search(line):
        if not re.search(r"O_WRONLY|O_RDWR|O_CREAT", found[3]) and "creat(" not in line:
            return None
    else:
        found = _MADE.search(line) or _RENAMED.search(line)
    return Path(found[1] or "") / found[2] if found else None


class Watcher:
    """Runs commands under strace, in folders of their own."""

    def __init__(self, root: Path) -> None:
        self.work, self.home, self.temporary = (root / n for n in ("work", "home", "tmp"))
        for folder in (self.work, self.home, self.temporary):
            folder.mkdir()
        self._log = root / "strace.log"
        # Nothing that the caller set may hide what the commands do by themselves.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "RAY_", "XDG_"))}
        self._environment = {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @property
    def documented(self) -> list[Path]:
        """The paths outside the named folders that docs/serving.md lists."""
        caches = (".cache/convoy", ".cache/matplotlib", ".config/matplotlib")
        return [self.temporary, *(self.home / cache for cache in caches)]

    def start(self, log: Path, *command: object, **options: object) -> subprocess.Popen[str]:
        """Start `python COMMAND`."""
        strace = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-y",
            "-qq",
            "-s",
            "4096",
            "-e",
            f"trace={_CALLS}",
        ]
        return subprocess.Popen(
            [*strace, "-o", str(log), sys.executable, *map(str, command)],
            cwd=self.work,
            env=self._environment,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def run(self, *command: object) -> Trace:
        """Run `python COMMAND` to its end, which must be a good one."""
        with self.start(
            self._log, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return Trace.read(self._log.read_text(errors="replace"), self.work)


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Watcher:
    root = tmp_path_factory.mktemp("watched")
    if subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    watcher = Watcher(root)
    (watcher.work / "images").mkdir()
    for number in range(4):
        picture = encode(photograph(40 + number, 50), "JPEG")
        (watcher.work / "images" / f"{number}.jpg").write_bytes(picture)
    return watcher


def test_the_watcher_sees_look_ups_connections_and_files(watcher):
    elsewhere = watcher.home / "elsewhere"
    program = f"""
import contextlib, socket
with contextlib.suppress(OSError):
    socket.getaddrinfo("convoy.example", 80)
with contextlib.suppress(OSError), socket.socket() as out:
    out.settimeout(0.1)
    out.connect(("192.0.2.1", 9))
open({str(elsewhere)!r}, "w").close()
"""
    trace = watcher.run("-c", program)
    strangers = trace.strangers()
    assert "192.0.2.1:9" in strangers
    assert any(contact.endswith(f":{_DNS_PORT}") for contact in strangers)
    assert trace.outside(watcher.documented) == [str(elsewhere)]


@dataclass(frozen=True)
class Watched:
    """What one command did, and the folders that it may write to."""

    trace: Trace
    folders: tuple[str, ...]


def _ask(watcher: Watcher, address: str) -> Iterator[tuple[str, Watched]]:
    there = ("--address", address)
    batch = ("images", "--out", "grpc/rows.csv")
    load = ("--duration-s", 1, "--concurrency", 2, "images/0.jpg")
    (watcher.work / "grpc").mkdir()
    for name, command, folders in (
        ("classify", ("classify", *there, "images/0.jpg"), ()),
        ("batch grpc", ("batch", *batch, *there), ("grpc",)),
        ("bench", ("bench", *load, *there), ()),
    ):
        yield name, Watched(watcher.run("-m", "convoy.client", *command), folders)


def _serve(watcher: Watcher) -> Iterator[tuple[str, Watched]]:
    """Serve, and run the commands that need a server; yields the server's own trace last."""
    log = watcher.work.parent / "server.log"
    flags = ("--port", 0, "--metrics-port", 0, "--log-format", "json", "--repository", "models")
    # Its processes are traced too, and do all that a server of one process does.
    flags += ("--front-ends", 1)
    with watcher.start(log, "-m", "convoy.server", *flags, stderr=subprocess.PIPE) as process:
        address = ""
        for line in process.stderr:
            if '"serving"' in line:
                address = json.loads(line)["address"]
                break
        try:
            yield from _ask(watcher, address)
        finally:
            # strace passes no signal on: the server is its child.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGTERM)
            process.stderr.read()
        assert process.wait(60) == 0
    yield "server", Watched(Trace.read(log.read_text(errors="replace"), watcher.work), ())


@pytest.fixture(scope="module")
def watched(watcher: Watcher) -> dict[str, Watched]:
    """Run every command once."""
    train = ("--data", "digits", "--model", "net_res_deep", "--epochs", 1, "--out", "run")
    export = ("run/best.pt", "--repository", "models", "--name", "digits")
    export += ("--format", "onnx", "--format", "torchscript")
    local = ("images", "--engine", "local", "--repository", "models", "--out", "local/rows.csv")
    found = {
        "train": Watched(watcher.run("-m", "convoy.training", *train), ("run",)),
        "export": Watched(watcher.run("-m", "convoy.export", *export), ("models",)),
    }
    (watcher.work / "local").mkdir()
    found["batch local"] = Watched(watcher.run("-m", "convoy.client", "batch", *local), ("local",))
    return found | dict(_serve(watcher))


COMMANDS = ("train", "export", "batch local", "batch grpc", "classify", "bench", "server")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_contacts_nobody_beyond_this_machine(name, watched):
    assert not watched[name].trace.strangers()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_only_to_the_named_folders(name, watched, watcher):
    folders = [watcher.work / folder for folder in watched[name].folders]
    assert not watched[name].trace.outside([*folders, *watcher.documented])


def test_the_trace_shows_the_expected_writes(watched, watcher):
    """The traces are not empty for want of a format that is understood."""
    assert watcher.work / "run" / "report.png" in watched["train"].trace.written
    assert any(path.name == "model.onnx" for path in watched["export"].trace.written)
    for name in ("classify", "batch grpc", "bench"):
        assert any("127.0.0.1:" in c for c in watched[name].trace.contacts)
