"""gRPC clients of other projects, each a process of its own, against each transport.

Every program of `programs/` makes the same calls and prints what each came to; one expectation
holds for all of them, directly and through reverse proxies. What a client cannot do is named with
its reason in `CLIENTS`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.edge.interop import proxies
from tests.edge.interop.clients import (
    ANSWER,
    CANCELLED,
    CLIENTS,
    EXPECTED,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    UNKNOWN_MODEL,
    Client,
    all_calls,
    calls_until,
    finish,
    start,
)
from tests.edge.interop.conftest import Servers
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.conftest import publish_version

PROXIES = {"nginx": proxies.nginx, "haproxy": proxies.haproxy}
# A client, and the proxy between it and the server.
ROUTES = {
    **{name: (client, None) for name, client in CLIENTS.items()},
    **{
        f"{name} through {proxy}": (CLIENTS[name], proxy)
        for proxy in PROXIES
        for name in ("grpcio", "grpc-js")
    },
}
# haproxy 2.6 sometimes resets the stream in place of an answer that comes before the request's end.
RESET_BY_HAPROXY = {RESOURCE_EXHAUSTED, CANCELLED}


@dataclass(frozen=True)
class Run:
    """What all calls of a client, through a proxy or none, came to."""

    client: Client
    proxy: str | None
    outcomes: dict[str, Any]


@pytest.fixture(scope="module")
def run_of(
    servers_of: Callable[[str], Servers], descriptors: Path, tmp_path_factory
) -> Callable[[str, str], Run]:
    """What a route's calls to the servers of a transport came to; each route is tried once."""

    @cache
    def run(route: str, transport: str) -> Run:
        client, proxy = ROUTES[route]
        targets = servers_of(transport).targets
        if proxy:
            with PROXIES[proxy](targets, tmp_path_factory.mktemp(proxy)) as proxied:
                outcomes = finish(start(client, all_calls(proxied, descriptors)))
        else:
            outcomes = finish(start(client, all_calls(targets, descriptors)))
        return Run(client, proxy, outcomes)

    return run


@pytest.fixture(params=ROUTES)
def run(request, transport: str, run_of: Callable[[str, str], Run]) -> Run:
    return run_of(request.param, transport)


@pytest.mark.parametrize("call", EXPECTED)
def test_a_call(run, call):
    if call in run.client.lacks:
        pytest.skip(run.client.lacks[call])
    if (run.proxy, call) == ("haproxy", "oversized"):
        assert run.outcomes[call] in RESET_BY_HAPROXY
        return
    assert run.outcomes[call] == EXPECTED[call]


def test_an_error_arrives_with_its_text(run):
    code, text = run.outcomes["error"]
    assert code == NOT_FOUND
    assert repr(UNKNOWN_MODEL) in text


def test_a_full_queue_tells_when_to_try_again(run):
    code, *pushback_ms = run.outcomes["pushback"]
    assert code == RESOURCE_EXHAUSTED
    if "trailers" in run.client.lacks:
        pytest.skip(run.client.lacks["trailers"])
    assert int(pushback_ms[0]) > 0


def test_a_stream_answers_every_request(run):
    answers = dict(run.outcomes["stream"])
    assert repr(UNKNOWN_MODEL) in answers.pop("bad")
    assert answers == dict.fromkeys(map(str, range(50)), ANSWER["logits"])


@dataclass
class Reloading:
    """A server whose model gets further versions.

    Attributes:
        newest: The number of the newest version.
    """

    server: ServerProcess
    repository: Path
    newest: int

    def publish(self) -> None:
        """Publish one more version."""
        self.newest += 1
        publish_colors(self.repository, self.newest)


def publish_colors(repository: Path, number: int) -> None:
    """Write a version beside the repository and put it there by one rename."""
    staged = publish_version(repository / "staged" / "colors" / str(number))
    folder = repository / "models" / "colors"
    folder.mkdir(parents=True, exist_ok=True)
    staged.rename(folder / str(number))


@pytest.fixture(scope="module")
def reloading_of(tmp_path_factory) -> Iterator[Callable[[str], Reloading]]:
    """A reloading server of a transport, kept for all tests that ask for it."""
    with ExitStack() as stack:

        @cache
        def reloading(transport: str) -> Reloading:
            repository = tmp_path_factory.mktemp("reloads")
            publish_colors(repository, 1)
            flags = ("--device", "cpu", *GRPC_FLAGS[transport], "--poll-s", 0.1)
            server = stack.enter_context(running_server(repository / "models", *flags))
            return Reloading(server, repository, newest=1)

        yield reloading


@pytest.mark.parametrize("name", CLIENTS)
def test_no_call_fails_while_a_version_is_replaced(name, transport, reloading_of, descriptors):
    reloading = reloading_of(transport)
    old, new = reloading.newest, reloading.newest + 1
    process = start(CLIENTS[name], calls_until(new, reloading.server.address, descriptors))
    assert process.stdout
    assert process.stdout.readline() == "calling\n"
    reloading.publish()
    outcome = finish(process)["reload"]
    assert outcome["failures"] == []
    assert set(outcome["versions"]) == {str(old), str(new)}
