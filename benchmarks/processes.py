"""Server processes under measurement, and the kernel's figures for them."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready.

    Attributes:
        pid: Of the process that started all of its others; 0 where it is not known.
        ready_s: From the start of the process until it served.
        url: "http://HOST:PORT" of its REST.
    """

    address: str
    pid: int
    ready_s: float
    url: str = ""

    @property
    def rss_mb(self) -> float:
        """Resident memory of all its processes; pages that they share count for each."""
        if not self.pid:
            return float("nan")
        return sum(_resident_mb(pid) for pid in _tree(self.pid))


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def tree_seconds(pid: int) -> float:
    """Processor time so far of a process and of all that it started and that live."""
    if not pid:
        return float("nan")
    return sum(map(_seconds_if_alive, _tree(pid)))


def _tree(root: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # A process may end meanwhile.
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _seconds_if_alive(pid: int) -> float:
    try:
        return cpu_seconds(pid)
    except OSError:
        return 0.0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def busy_seconds() -> float:
    """Processor time that the whole machine has spent so far."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _idle, _waiting, *interrupts = map(int, line.split()[1:9])
    return (user + nice + system + sum(interrupts)) / _TICKS_PER_S


def children_seconds() -> float:
    """Processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class OtherWork:
    """The processor time that other processes used since its creation."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._busy_s = _others_seconds()

    def processors(self) -> float:
        """Return how many processors they kept busy, on average."""
        return (_others_seconds() - self._busy_s) / (time.monotonic() - self._began_s)


def _others_seconds() -> float:
    return busy_seconds() - cpu_seconds(os.getpid())


@contextmanager
def serving(command: Sequence[str]) -> Iterator[Server]:
    """Start `python -m COMMAND`, wait until it logs "serving", and end it afterwards."""
    started_s = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            for line in process.stderr:
                event = json.loads(line) if line.startswith("{") else {}
                if event.get("event") == "serving":
                    ready_s = time.monotonic() - started_s
                    url = f"http://{event.get('rest', event['address'])}"
                    yield Server(event["address"], process.pid, ready_s, url)
                    break
            else:
                raise SystemExit(f"{command[0]} did not start")
        finally:
            process.terminate()
            # Its log must not fill the pipe during the drain.
            process.stderr.read()
