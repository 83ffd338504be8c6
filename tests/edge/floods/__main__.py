"""Prints what each attack does to a server: `python -m tests.edge.floods TRANSPORT [NAME …]`."""

import argparse
import tempfile
from pathlib import Path

from tests.edge.floods.attacks import ATTACKS
from tests.edge.floods.test_floods import FLAGS, bystanders
from tests.edge.floods.victim import Damage
from tests.server.conftest import publish_version


def main() -> None:
    """Runs attacks, one after the other, against a server that it starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transport", choices=FLAGS)
    parser.add_argument("name", nargs="*", default=list(ATTACKS))
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish_version(Path(folder) / "colors" / "1")
        with bystanders(Path(folder)) as both:
            for name in arguments.name:
                damage = both.attack(arguments.transport, name, arguments.seconds)
                print(f"{name:24} {_described(damage)}", flush=True)


def _described(damage: Damage) -> str:
    caller, outcome = damage.caller, damage.outcome
    return (
        f"p99 {caller.p99_s * 1e3:6.1f} ms, elsewhere {damage.elsewhere.p99_s * 1e3:6.1f} ms, "
        f"memory +{damage.grown_mib:5.0f} MiB, processor {damage.processor_s:4.1f} s, "
        f"sent {outcome.sent_bytes / 1e6:6.1f} MB, connections {outcome.connections} "
        f"({outcome.unconnected} unconnected, {outcome.closed} closed) "
        f"{outcome.goaways or ''} {outcome.resets or ''} {outcome.statuses or ''} "
        f"{caller.failures or ''}"
    )


if __name__ == "__main__":
    main()
