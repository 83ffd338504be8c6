"""Runs a server for minutes under load, with cancels and swaps, and watches its memory.

    make soak             # 10 minutes
    make soak MINUTES=60

Many requests are cancelled or run into their deadline at a random moment, as many as a server that
closes connections for rapid resets takes (docs/security.md). Every answer is checked. The run fails
where an answer is wrong, an unexpected status comes, the server does not end with 0, or its
resident memory still grew by more than 5 % from the second quarter to the last.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

from convoy.oip.v2 import inference_pb2_grpc
from tests.chaos.traffic import request_for
from tests.processes import ServerProcess, running_server
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits, publish_version

CALLERS = 16
# Of one caller's cancels and deadlines: h2corn closes a connection after 200 resets in 10 s.
RESET_EVERY_S = 0.1
MAX_GROWTH = 0.05
EXPECTED = {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}


def resident_mib(pid: int) -> float:
    """Returns the memory of a process that is in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


class Soak:
    """The load of one run, with what came of it.

    Args:
        server: Who answers.
        models: Its repository.
        minutes: When to stop.
        requests: When to stop sooner.
        swap_every_s: When a new version is published.
        sample_every_s: When the memory is measured.
    """

    def __init__(
        self,
        server: ServerProcess,
        models: Path,
        minutes: float,
        *,
        requests: float = float("inf"),
        swap_every_s: float = 30.0,
        sample_every_s: float = 5.0,
    ) -> None:
        self._server = server
        self._models = models
        self._until_s = time.monotonic() + 60 * minutes
        self._requests = requests
        self._swap_every_s = swap_every_s
        self._sample_every_s = sample_every_s
        self._random = random.Random(0)
        self.codes: Counter[str] = Counter()
        self.wrong = 0
        self.memory_mib: list[float] = []

    async def run(self) -> None:
        """Sends requests, publishes versions and measures until the time is over."""
        callers = (self._call(seed) for seed in range(CALLERS))
        await asyncio.gather(self._publish(), self._measure(), *callers)

    def _left_s(self) -> float:
        if self.codes.total() >= self._requests:
            return 0.0
        return self._until_s - time.monotonic()

    async def _call(self, seed: int) -> None:
        # Channels share a connection unless each has a pool of its own.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._server.address, options) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            pixels = np.random.default_rng(seed)
            reset_s = 0.0
            while self._left_s() > 0:
                count = int(pixels.integers(1, 9))
                images = pixels.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
                kind = self._random.choice(("plain", "plain", "cancel", "deadline"))
                if kind != "plain":
                    if time.monotonic() - reset_s < RESET_EVERY_S:
                        kind = "plain"
                    else:
                        reset_s = time.monotonic()
                await self._infer(stub, images, kind)

    async def _infer(
        self, stub: inference_pb2_grpc.GRPCInferenceServiceStub, images: np.ndarray, kind: str
    ) -> None:
        patience_s = self._random.uniform(0, 0.01)
        call = stub.ModelInfer(
            request_for(images), timeout=patience_s if kind == "deadline" else 60
        )
        if kind == "cancel":
            asyncio.get_running_loop().call_later(patience_s, call.cancel)
        try:
            reply = await call
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
        except asyncio.CancelledError:
            self.codes["CANCELLED"] += 1
        else:
            self.codes["OK"] += 1
            logits = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(len(images), -1)
            self.wrong += not np.allclose(logits, mean_color_logits(images), atol=1e-5)

    async def _publish(self) -> None:
        version = 1
        while self._left_s() > self._swap_every_s:
            await asyncio.sleep(self._swap_every_s)
            version += 1
            staged = publish_version(self._models.parent / "staged" / "colors" / str(version))
            staged.rename(self._models / "colors" / str(version))

    async def _measure(self) -> None:
        started_s = time.monotonic()
        while self._left_s() > 0:
            await asyncio.sleep(min(self._sample_every_s, max(0.0, self._left_s())))
            self.memory_mib.append(resident_mib(self._server.process.pid))
            print(
                f"{time.monotonic() - started_s:6.0f} s  {self.memory_mib[-1]:7.1f} MiB  "
                + "  ".join(f"{code} {count}" for code, count in sorted(self.codes.items())),
                flush=True,
            )


def faults(soak: Soak, exit_code: int, max_growth: float = MAX_GROWTH) -> list[str]:
    """Returns what the run must not have shown."""
    found = []
    if soak.wrong:
        found.append(f"{soak.wrong} answers were not those of their images")
    if unexpected := set(soak.codes) - EXPECTED:
        found.append(f"unexpected status: {', '.join(sorted(unexpected))}")
    if exit_code != 0:
        found.append(f"the server ended with {exit_code}")
    quarter = len(soak.memory_mib) // 4
    if not quarter:
        return [*found, "too short to tell anything of memory"]
    before = statistics.median(soak.memory_mib[quarter : 2 * quarter])
    after = statistics.median(soak.memory_mib[-quarter:])
    print(f"resident memory: {before:.1f} MiB in the second quarter, {after:.1f} MiB in the last")
    if after > (1 + max_growth) * before:
        found.append(f"memory grew from {before:.1f} to {after:.1f} MiB")
    return found


def main() -> None:
    """Runs one soak and exits 1 where it showed a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("flags", nargs="*", help="further flags of the server, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        publish_version(models / "colors" / "1")
        with running_server(models, "--device", "cpu", *options.flags) as server:
            soak = Soak(server, models, options.minutes)
            asyncio.run(soak.run())
            exit_code = server.stop()
    found = faults(soak, exit_code)
    print("\n".join(found) or "no fault")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
