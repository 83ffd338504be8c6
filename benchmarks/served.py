"""Starts a server, runs `convoy-client bench` against it, and ends it.

python -m benchmarks.served MODELS "SERVER FLAGS" BENCH FLAGS…
python -m benchmarks.served models "--device cuda" --payload raw --concurrency 1,64,256 --plot p.png
"""

import subprocess
import sys

from benchmarks.processes import serving


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    repository, flags, *bench = sys.argv[1:]
    ports = ["--port", "0", "--metrics-port", "0", "--log-format", "json"]
    with serving(["convoy.server", "--repository", repository, *ports, *flags.split()]) as server:
        command = [
            sys.executable,
            "-m",
            "convoy.client",
            "bench",
            "--address",
            server.address,
            *bench,
        ]
        status = subprocess.run(command, check=False).returncode
    raise SystemExit(status)


if __name__ == "__main__":
    main()
