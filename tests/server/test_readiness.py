"""Every answer about health and readiness, in each state of the server, as the documents say.

The states and the right answers are those of the table in docs/operations.md. One server, in this
process, goes through all of them; each answer is asked for in every way that there is.
"""

import asyncio
import contextlib
import gc
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from typer.testing import CliRunner

from convoy.client import Client
from convoy.client.cli import app as client_command
from convoy.client.errors import ClientError
from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.app import App
from convoy.server.backends.base import Backend
from convoy.server.backends.onnx import OnnxBackend
from convoy.server.batching import Health
from convoy.server.grpc.health import HEALTH
from convoy.server.models.loader import ModelLoader
from convoy.server.models.readiness import ServerState, readiness
from convoy.server.settings import parse_settings
from convoy.v1 import classifier_pb2, classifier_pb2_grpc
from tests.processes import GRPC_FLAGS
from tests.server.test_process import infer_request

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
QUESTIONS = ("live", "ready", "colors", "shades")
# No version of the model is in service; many ways to ask know only yes and no.
UNKNOWN = "-"
# A port that takes no calls any more.
CLOSED = "closed"
HEALTH_STATES = {1: "yes", 2: "no", 3: UNKNOWN}
DEADLINE_S = 30.0
ADMIN = [("authorization", "Bearer admin")]


def documented() -> dict[str, dict[str, str]]:
    """Reads the answers to all questions by state."""
    section = OPERATIONS.read_text().split("## Health and readiness\n")[1].split("\n## ")[0]
    table = section.split("| state |")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: dict(zip(QUESTIONS, row[1:], strict=True)) for row in rows}


class Faults:
    """Hold up loads and runs in this process, or make runs fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads, self.runs = threading.Event(), threading.Event()
        self.backends: dict[str, Sequence[Backend]] = {}
        self.failing: set[Backend] = set()
        self.runs.set()
        load, run = ModelLoader.load, OnnxBackend.run

        def held_up_load(loader, folder):
            self.loads.wait()
            model = load(loader, folder)
            self.backends[model.name] = model.backends
            return model

        def held_up_run(backend, images):
            self.runs.wait()
            if backend in self.failing:
                raise RuntimeError("the device is lost")
            return run(backend, images)

        monkeypatch.setattr(ModelLoader, "load", held_up_load)
        monkeypatch.setattr(OnnxBackend, "run", held_up_run)

    def end(self) -> None:
        self.loads.set()
        self.runs.set()
        self.failing.clear()


class Asked:
    """Asks a server about its health in every way that there is."""

    def __init__(self, app: App, channel: grpc.aio.Channel) -> None:
        self._app = app
        self._oip = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._classifier = classifier_pb2_grpc.ClassifierServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        method = HEALTH.methods_by_name["List"]
        self._no_list_request = GetMessageClass(method.input_type)()
        self._list = channel.unary_unary(
            "/grpc.health.v1.Health/List",
            lambda message: message.SerializeToString(),
            GetMessageClass(method.output_type).FromString,
        )
        self.rest_address = f"127.0.0.1:{app.rest_port or app.port}"

    async def answers(self) -> dict[str, dict[str, str]]:
        """Returns the answer to each question by the way it was asked."""
        found: dict[str, dict[str, str]] = {}
        metrics = await asyncio.to_thread(_metrics, f"http://127.0.0.1:{self._app.metrics_port}")
        found["live"] = {
            "/healthz": await self._get("/healthz"),
            "/v2/health/live": await self._get("/v2/health/live", rest=True),
            "ServerLive": await self._ask(self._server_live()),
            "convoy_live": metrics["convoy_live", ""],
            "Client.health": await asyncio.to_thread(self._client_live),
        }
        listed = await self._ask(self._listed())
        found["ready"] = {
            "/readyz": await self._get("/readyz"),
            "/v2/health/ready": await self._get("/v2/health/ready", rest=True),
            "ServerReady": await self._ask(self._server_ready()),
            "convoy_ready": metrics["convoy_ready", ""],
            "convoy-client health": await asyncio.to_thread(self._command),
            **await self._health_answers("", listed),
        }
        models = await self._ask(self._list_models())
        for name in ("colors", "shades"):
            found[name] = {
                f"/v2/models/{name}/ready": await self._get(f"/v2/models/{name}/ready", rest=True),
                "ModelReady": await self._ask(self._model_ready(name)),
                "ListModels": models if isinstance(models, str) else models.get(name, UNKNOWN),
                "convoy_model_ready": metrics.get(("convoy_model_ready", name), UNKNOWN),
                "convoy-client health": await asyncio.to_thread(self._command, "--model", name),
                **await self._health_answers(name, listed),
            }
        return found

    async def _health_answers(self, name: str, listed: object) -> dict[str, str]:
        return {
            "Check": await self._ask(self._check(name)),
            "List": listed if isinstance(listed, str) else listed.get(name, UNKNOWN),
            "Watch": await self._ask(self._watch(name)),
        }

    async def _get(self, path: str, rest: bool = False) -> str:
        url = f"http://{self.rest_address if rest else f'127.0.0.1:{self._app.metrics_port}'}{path}"
        return await asyncio.to_thread(_get, url)

    async def _ask(self, call):
        try:
            return await call
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return CLOSED

    async def _server_live(self) -> str:
        return _yes((await self._oip.ServerLive(pb.ServerLiveRequest())).live)

    async def _server_ready(self) -> str:
        return _yes((await self._oip.ServerReady(pb.ServerReadyRequest())).ready)

    async def _model_ready(self, name: str) -> str:
        return _yes((await self._oip.ModelReady(pb.ModelReadyRequest(name=name))).ready)

    async def _list_models(self) -> dict[str, str]:
        reply = await self._classifier.ListModels(classifier_pb2.ListModelsRequest())
        return {each.model: _yes(each.ready) for each in reply.models}

    async def _check(self, name: str) -> str:
        try:
            reply = await self._health.Check(health_pb2.HealthCheckRequest(service=name))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return UNKNOWN
            raise
        return HEALTH_STATES[reply.status]

    async def _watch(self, name: str) -> str:
        call = self._health.Watch(health_pb2.HealthCheckRequest(service=name))
        reply = await call.read()
        call.cancel()
        return CLOSED if reply is grpc.aio.EOF else HEALTH_STATES[reply.status]

    async def _listed(self) -> dict[str, str]:
        reply = await self._list(self._no_list_request)
        return {name: HEALTH_STATES[each.status] for name, each in reply.statuses.items()}

    def _client_live(self) -> str:
        with Client(f"127.0.0.1:{self._app.port}") as client:
            try:
                return _yes(client.health().live)
            except ClientError:
                return CLOSED

    def _command(self, *arguments: str) -> str:
        address = f"127.0.0.1:{self._app.port}"
        result = CliRunner().invoke(client_command, ["health", "--address", address, *arguments])
        return CLOSED if result.exception and not result.output else _yes(result.exit_code == 0)


def _yes(good: bool) -> str:
    return "yes" if good else "no"


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return _yes(reply.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return "no"
    except OSError:
        return CLOSED


def _metrics(address: str) -> dict[tuple[str, str], str]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return {
        (sample.name, sample.labels.get("model", "")): _yes(bool(sample.value))
        for family in families
        for sample in family.samples
        if sample.name in ("convoy_live", "convoy_ready", "convoy_model_ready")
    }


def accepted(expected: str, state: str) -> set[str]:
    """The words that stand for an answer, for those who know fewer of them."""
    words = {expected} | ({"no"} if expected == UNKNOWN else set())
    return words | ({CLOSED} if state == "draining" else set())


async def until_documented(asked: Asked, state: str) -> None:
    """Waits until the server gives the documented answer to every question in every way."""
    expected = documented()[state]
    end_s = asyncio.get_running_loop().time() + DEADLINE_S
    while True:
        answers = await asked.answers()
        wrong = {
            f"{question}: {way}": answer
            for question in QUESTIONS
            for way, answer in answers[question].items()
            if answer not in accepted(expected[question], state)
        }
        if not wrong:
            return
        assert asyncio.get_running_loop().time() < end_s, (state, wrong)
        await asyncio.sleep(0.05)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    it = Faults(monkeypatch)
    # Writing the traces of failing runs would take seconds.
    with capture_logs():
        yield it
    it.end()
    # The server has frozen what was there when it started.
    gc.unfreeze()


@contextlib.asynccontextmanager
async def starting(models: Path, transport: str, *flags: str) -> AsyncIterator[tuple[App, Asked]]:
    """Starts a server; at the end it has drained."""
    token = models.parent / "admin"
    token.write_text("admin")
    ports = ["--port", "0", "--metrics-port", "0", "--admin-port", "0"]
    ports += ["--rest-port", "0"] if transport == "grpcio" else []
    always = ["--repository", str(models), "--device", "cpu", "--admin-token-file", str(token)]
    always += ["--poll-s", "0", "--lame-duck-s", "600", *GRPC_FLAGS[transport]]
    app = App(parse_settings([*always, *ports, *flags]), CollectorRegistry())
    start = asyncio.create_task(app.__aenter__())
    while not app.port:  # noqa: ASYNC110  the ports are opened before the start is over
        await asyncio.sleep(0.01)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), DEADLINE_S)
        yield app, Asked(app, channel)
    await start


def admin_of(app: App) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{app.admin_port}")


# It waits for the watchdog and for probes, and front ends are processes.
@pytest.mark.slow
@pytest.mark.parametrize("transport", GRPC_FLAGS)
async def test_every_answer_in_every_state_is_the_documented_one(publish, faults, transport):
    models = publish().parent.parent
    flags = ("--hang-timeout-s", "1", "--drain-timeout-s", "600")
    asked_for = set(documented())

    async def shows(state: str) -> None:
        await until_documented(asked, state)
        asked_for.discard(state)

    async with starting(models, transport, *flags) as (app, asked):
        await shows("starting")
        faults.loads.set()
        await shows("serving")
        async with (
            admin_of(app) as admin_channel,
            grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel,
        ):
            admin = inference_pb2_grpc.GRPCInferenceServiceStub(admin_channel)
            infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            faults.runs.clear()
            hung = infer(infer_request())
            await shows("a run hangs")
            command = ["health", "--address", f"127.0.0.1:{app.port}"]
            result = await asyncio.to_thread(CliRunner().invoke, client_command, command)
            assert "the server is not live: restart it" in result.output
            faults.runs.set()
            assert await hung.code() is grpc.StatusCode.UNAVAILABLE
            await shows("serving")
            load = pb.RepositoryModelLoadRequest(model_name="colors")
            unload = pb.RepositoryModelUnloadRequest(model_name="colors")
            await admin.RepositoryModelUnload(unload, metadata=ADMIN)
            await shows("no model in service")
            await admin.RepositoryModelLoad(load, metadata=ADMIN)
            publish(name="shades")
            load.model_name = unload.model_name = "shades"
            await admin.RepositoryModelLoad(load, metadata=ADMIN)
            await shows("two models serving")
            faults.failing.update(faults.backends["shades"])
            await until_unavailable(infer, "shades")
            await shows("every run of one of two models fails")
            faults.failing.clear()
            await shows("two models serving")
            await admin.RepositoryModelUnload(unload, metadata=ADMIN)
            await shows("one of two models unloaded")
            faults.failing.update(faults.backends["colors"])
            await until_unavailable(infer, "colors")
            await shows("every run fails")
            faults.failing.clear()
            await shows("serving")
        lame_duck = asyncio.create_task(app.lame_duck())
        await shows("lame duck")
        lame_duck.cancel()
        with half_a_request(asked.rest_address):
            stopping = asyncio.create_task(app.__aexit__(None, None, None))
            await shows("draining")
        await stopping
    assert not asked_for


async def until_unavailable(infer, model: str) -> None:
    """Sends requests to a model that fails until it takes no more."""
    request = infer_request()
    request.model_name = model
    codes = {None}
    while grpc.StatusCode.UNAVAILABLE not in codes:
        call = infer(request)
        codes.add(await call.code())
    assert codes == {None, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}


@contextlib.contextmanager
def half_a_request(address: str) -> Iterator[None]:
    """Holds up a drain by a request whose body does not end."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as caller:
        caller.sendall(
            b"POST /v2/models/colors/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
        )
        yield


@pytest.mark.parametrize("transport", ["h2corn", "grpcio"])
async def test_a_server_without_a_model_is_live_and_not_ready(tmp_path, faults, transport):
    (tmp_path / "models").mkdir()
    async with starting(tmp_path / "models", transport) as (app, asked):
        await until_documented(asked, "no model in service")
        await app.__aexit__(None, None, None)


@pytest.mark.parametrize("state", ServerState)
def test_what_a_version_beside_the_default_does_concerns_itself_alone(state):
    versions = {("digits", 1): Health.HEALTHY, ("digits", 2): Health.HUNG}
    now = readiness(state, True, versions, {"digits": 1})
    serving = state is ServerState.SERVING
    assert (now.live, now.ready, now.models) == (True, serving, {"digits": serving})
    assert now.versions == {("digits", 1): serving, ("digits", 2): False}


def test_a_server_that_callers_do_not_reach_is_not_ready():
    now = readiness(ServerState.SERVING, False, {("digits", 1): Health.HEALTHY}, {"digits": 1})
    assert (now.live, now.ready, now.models) == (True, False, {"digits": False})
