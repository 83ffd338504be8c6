"""The server's settings: flags, CONVOY_… environment variables, an optional TOML file."""

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from convoy.server.errors import StartupError

# Settings of earlier versions, and what to set instead.
_REMOVED = {
    "http_port": "REST and the page are on --port, /metrics, /healthz and /readyz on "
    "--metrics-port",
    "max_queue_mb": "use --max-queue-mib",
    "max_message_mb": "use --max-message-mib",
    "lame_duck_seconds": "use --lame-duck-s",
    "channelz": "see convoy_calls_total and convoy_open_calls in /metrics",
}

# Variables that are not settings of the server: the path of its file, and those of convoy-client.
_OTHER_VARIABLES = frozenset(
    {
        "CONVOY_CONFIG",
        *("CONVOY_ADDRESS", "CONVOY_GZIP", "CONVOY_TLS", "CONVOY_TLS_CA", "CONVOY_TLS_SERVER_NAME"),
        "CONVOY_TOKEN",
    }
)

# Variables that Kubernetes sets for every Service of a namespace, such as convoy-predictor.
_SERVICE_LINK = re.compile(
    r"\w+_((SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|PORT=(tcp|udp|sctp)://.*)"
)

Port = Annotated[int, Field(ge=0, le=65535)]


class ModelSettings(BaseModel):
    """Which versions are served, and how a newer one takes over."""

    repository: Annotated[str, BeforeValidator(os.fspath)] = Field(
        min_length=1,
        description="Folder of models, NAME/VERSION/manifest.json, as convoy-export writes it, or "
        "its URL in an object store: s3://, gs://, az://, https:// and others that fsspec opens "
        "(extra cloud).",
    )
    cache_dir: Path | None = Field(
        None,
        description="With a URL as --repository: folder for copies of its versions, of this server "
        "alone. If it outlives the process, a restart fetches nothing again and needs no store. "
        "Unset: a folder in $XDG_CACHE_HOME/convoy or ~/.cache/convoy.",
    )
    cache_mib: float = Field(
        10240.0,
        gt=0,
        description="MiB that these copies may take. The server removes those that it loaded "
        "least recently. A version larger than this is rejected.",
    )
    version_policy: str = Field(
        "latest:1",
        pattern=r"^(latest(:[1-9][0-9]{0,3})?|all|specific)$",
        description="latest:N serves the default version and the N - 1 before it, all serves "
        "every version, specific serves only the version chosen by convoy-export "
        "promote. The default version is the promoted one, otherwise the newest.",
    )
    poll_s: float = Field(
        2.0,
        ge=0,
        description="Seconds between two scans of the repository for new versions. In a store, "
        "each scan is a paid request per 1,000 files. 0: scan only at the start.",
    )
    load_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds that loading a version may take, warm-up included. After that the "
        "server rejects the version; other models are not affected meanwhile.",
    )
    exit_on_error: bool = Field(
        False,
        description="Exit at the start if a model has no version that loads, or there is no model. "
        "By default the server serves the models that load, and waits for good versions.",
    )
    require_signature: Path | None = Field(
        None,
        description="File with an Ed25519 public key (PEM). The server rejects versions that "
        "were not signed with the matching private key (convoy-export --sign-key).",
    )
    canary_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the live requests that are mirrored to a newer version before it "
        "replaces the current one. Callers receive the current version's answers; "
        "the server compares both. 0: a version that passed its checks replaces "
        "the current one at once.",
    )
    canary_requests: int = Field(
        200,
        ge=1,
        description="Mirrored requests after which the server decides on a canary.",
    )
    canary_timeout_s: float = Field(
        300.0,
        gt=0,
        description="Seconds after which the requests so far may roll a canary back; otherwise the "
        "trial continues.",
    )
    state_dir: Path | None = Field(
        None,
        description="Folder where the server records the verdicts of canaries, for a repository "
        "that is read-only or in a store. After a restart, versions that failed stay rolled back, "
        "and those that passed need no new trial. Replicas may share it. Unset: the repository, "
        "beside the versions; with a URL as --repository, --cache-dir.",
    )
    record_key: Path | None = Field(
        None,
        description="File with an Ed25519 private key (PEM), which signs these records. The server "
        "then ignores records that were not signed with it. --require-signature needs it to keep "
        "records.",
    )
    canary_max_error_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of mirrored requests on which a canary may fail.",
    )
    canary_max_slowdown: float = Field(
        1.5,
        gt=0,
        description="Largest ratio of a canary's run time to the current version's.",
    )
    canary_max_disagreement: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Largest share of images for which a canary may predict another class.",
    )


class NetworkSettings(BaseModel):
    """Where callers and operators connect, and how the server stops."""

    host: str = Field(
        "127.0.0.1",
        description="Address for callers. Any host that can reach an address beyond loopback "
        "can send requests.",
    )
    port: Port = Field(
        8001,
        description="TCP port for callers: gRPC, REST (/v2) and the page. 0: pick a free port "
        "and log it.",
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="Address for operators. This port requires no token.",
    )
    metrics_port: Port = Field(
        8002,
        description="TCP port for operators: /metrics, /healthz and /readyz, always plain "
        "HTTP. 0: pick a free port and log it.",
    )
    transport: Literal["h2corn", "grpcio"] = Field(
        "h2corn",
        description="HTTP server for gRPC: h2corn also serves REST and the page on the same "
        "port; grpcio, gRPC's C core, serves gRPC only.",
    )
    rest_port: Port | None = Field(
        None,
        description="With --transport grpcio: TCP port for REST and the page. 0: pick a free "
        "port and log it. Unset: no REST.",
    )
    front_ends: int = Field(
        0,
        ge=0,
        le=256,
        description="Processes that answer callers on one port for the process that owns the "
        "device. Use them when one process cannot use all processors. 0: one "
        "process does both.",
    )
    ui: bool = Field(
        True,
        description="Serve the page on the port for callers.",
    )
    ui_examples: int = Field(
        8,
        ge=0,
        le=64,
        description="Golden samples of a version that the page offers to callers as examples. 0: "
        "none, where the pictures must stay private.",
    )
    lame_duck_s: float = Field(
        0.0,
        ge=0,
        description="Seconds after SIGTERM in which the server still answers but reports "
        "NOT_SERVING, so that load balancers stop sending requests.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        description="Seconds after SIGTERM within which accepted requests can finish.",
    )


class BatchingSettings(BaseModel):
    """How requests are batched and scheduled."""

    slo_ms: float = Field(
        0.0,
        ge=0,
        description="Latency objective in milliseconds, measured from a request's arrival; an "
        "earlier deadline of the caller takes precedence. The server rejects with "
        "DEADLINE_EXCEEDED what it cannot answer in time, and limits its batches "
        "accordingly. 0: use only the callers' deadlines.",
    )
    max_batch_size: int = Field(
        0,
        ge=0,
        le=4096,
        description="Largest number of images in a batch; within it the server measures the "
        "best size at start and corrects it in service. 0: no bound.",
    )
    batch_size: int = Field(
        0,
        ge=0,
        le=4096,
        description="Number of images that batches are filled up to, whatever the server measures. "
        "0: the size that it measures.",
    )
    warmup_s: float = Field(
        1.0,
        ge=0,
        description="Seconds for which the server measures the batch sizes of a version at most, "
        "beyond the first runs of each size. It stops earlier once their times are clear. A "
        "smaller value makes versions ready sooner and the choice less certain.",
    )
    max_queue_delay_ms: float = Field(
        0.0,
        ge=0,
        description="Milliseconds for which an idle model instance waits for a fuller batch. "
        "Values above 0 trade latency for larger batches. 0: take what is queued.",
    )
    instances: int = Field(
        0,
        ge=0,
        description="Model instances (threads that run batches) per model and device. 0: two "
        "on CUDA (one with --cuda-graphs, where each loads the model); on a CPU one per "
        "processor, at most two.",
    )
    hang_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds after which the server considers a run on the device hung: the "
        "model reports NOT_SERVING and its callers get UNAVAILABLE.",
    )


class DeviceSettings(BaseModel):
    """The devices and runtimes of the models."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu(,cpu)*|cuda:all|cuda(:[0-9]+)?(,cuda(:[0-9]+)?)*)$",
        description="auto, cpu, cuda or cuda:INDEX. Several devices, separated by commas "
        "(cuda:0,cuda:1) or as cuda:all, share one queue. auto uses CUDA if there "
        "is a device that the runtime can use; if there is one that it cannot use, the server "
        "warns and runs on the CPU. cuda fails if the device is unavailable; there is no CPU "
        "fallback.",
    )
    backend: Literal["onnx", "openvino", "torchscript", "exported-program", "aot-inductor"] = Field(
        "onnx",
        description="Runtime of the model. onnx and openvino (CPU only) run the ONNX artifact; "
        "the others run torch's artifacts and need torch.",
    )
    provider: Literal["cuda", "tensorrt"] = Field(
        "cuda",
        description="With --backend onnx on CUDA: ONNX Runtime's own kernels or TensorRT, which "
        "must be installed. TensorRT builds an engine when a version is first loaded, which takes "
        "minutes, and keeps it below --state-dir or beside the version. Not yet run on a GPU.",
    )
    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8"] = Field(
        "fp32",
        description="Variant of the artifact, as written by convoy-export --precision: tf32, fp16 "
        "and bf16 for CUDA, int8 for CPU. fp32 computes in float32 on every device; only tf32 "
        "lets CUDA round the factors of products to TF32.",
    )
    cuda_graphs: bool = Field(
        False,
        description="With --backend onnx on CUDA: capture a graph for each batch size and "
        "replay it. Experimental, not yet run on a GPU.",
    )


class LimitSettings(BaseModel):
    """Limits beyond which the server rejects requests."""

    max_queue_size: int = Field(
        1024,
        ge=1,
        description="Images that may wait per model. The server rejects further requests at "
        "once with RESOURCE_EXHAUSTED. A longer queue delays answers; it does not "
        "add throughput.",
    )
    max_queue_mib: float = Field(
        256.0,
        gt=0,
        description="MiB of pixels that may wait per model, with the same rejection.",
    )
    max_client_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Largest share of the queue for the requests of one client address. Keep 1 "
        "behind a proxy, because all clients then have the proxy's address.",
    )
    max_request_images: int = Field(
        256,
        ge=1,
        le=65536,
        description="Largest number of images in one request. The server splits a request over "
        "batches.",
    )
    max_message_mib: float = Field(
        16.0,
        gt=0,
        le=2047,
        description="Largest gRPC message in MiB. The server raises it if the largest request "
        "needs more.",
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="Largest encoded image to decode, in pixels (width x height). It bounds "
        "the memory of a decoding thread: at most 16 bytes per pixel, 8 for most formats.",
    )
    max_buffered_mib: float = Field(
        512.0,
        gt=0,
        description="MiB that unanswered requests may hold in each process: received, "
        "partially read, waiting or inflated. The server rejects further requests "
        "with RESOURCE_EXHAUSTED.",
    )
    max_connections: int = Field(
        1024,
        ge=1,
        le=65536,
        description="Callers' connections in each process; further connections wait.",
    )
    max_connection_idle_s: float = Field(
        300.0,
        gt=0,
        description="Seconds after which the server closes a connection without requests.",
    )
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        description="Seconds after which the server sends GOAWAY on a connection, so that clients "
        "find new servers; open requests are answered first, for at most --drain-timeout-s. 0: "
        "never.",
    )


class SecuritySettings(BaseModel):
    """TLS, tokens and the admin port."""

    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the server's certificate chain. The port for callers then "
        "accepts TLS only. The server reads replaced files again.",
    )
    tls_key: Path | None = Field(
        None,
        description="PEM file with the certificate's private key.",
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authority that must have signed the client's "
        "certificate (mutual TLS).",
    )
    token_file: Path | None = Field(
        None,
        description="File with bearer tokens, one per line; every request must carry one of "
        "them. Check and Watch of grpc.health.v1 and the page's files need none. "
        "Without TLS, tokens can be intercepted.",
    )
    admin_port: Port | None = Field(
        None,
        description="TCP port for the RPCs that list, load and unload models. 0: pick a free "
        "port and log it. Unset: no such port.",
    )
    admin_token_file: Path | None = Field(
        None,
        description="File with bearer tokens for the admin port, which requires one.",
    )


class ObservabilitySettings(BaseModel):
    """Logs and traces."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Lowest severity to log.",
    )
    log_format: Literal["console", "json"] = Field(
        "console",
        description="Format of log lines on stderr.",
    )
    otlp_endpoint: str = Field(
        "",
        description="URL of an OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces, "
        "or http://127.0.0.1:4317 with --otlp-protocol grpc. Needs the extra otel. Empty: no "
        "traces.",
    )
    otlp_protocol: Literal["http", "grpc"] = Field(
        "http",
        description="How spans are sent to the collector: OTLP over HTTP or over gRPC, which uses "
        "TLS if the URL begins with https.",
    )


# In the order in which --help lists them.
GROUPS: dict[str, type[BaseModel]] = {
    "models": ModelSettings,
    "network": NetworkSettings,
    "batching": BatchingSettings,
    "devices": DeviceSettings,
    "limits": LimitSettings,
    "security": SecuritySettings,
    "observability": ObservabilitySettings,
}


class ServerSettings(
    # pydantic lists the fields of the last base first.
    ObservabilitySettings,
    SecuritySettings,
    LimitSettings,
    DeviceSettings,
    BatchingSettings,
    NetworkSettings,
    ModelSettings,
    BaseSettings,
):
    """Serve every model of a repository by gRPC and REST, with dynamic batching and metrics.

    Every flag can also be set in the environment (--max-batch-size is CONVOY_MAX_BATCH_SIZE) or in
    the TOML file that CONVOY_CONFIG names (max_batch_size = 32). A flag takes precedence over
    the environment, the environment over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="CONVOY_",
        cli_prog_name="convoy-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        frozen=True,
        extra="forbid",
    )

    @property
    def slo_s(self) -> float:
        """The time to answer a request; infinity without an objective."""
        return self.slo_ms / 1000 or float("inf")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags, then the environment, then the TOML file."""
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get("CONVOY_CONFIG"))
        return init_settings, env_settings, toml


def parse_settings(arguments: list[str]) -> ServerSettings:
    """Read the settings for a command line.

    Raises:
        StartupError: A setting is missing, unknown or out of range; the message is one line.
    """
    config = os.environ.get("CONVOY_CONFIG")
    if config and not Path(config).is_file():
        raise StartupError(f"CONVOY_CONFIG: expected a TOML file, got {config!r}")
    try:
        _check_removed(arguments, config)
        _check_environment()
        source: CliSettingsSource[ServerSettings] = CliSettingsSource(
            ServerSettings, add_argument_method=_GroupedHelp()
        )
        return CliApp.run(ServerSettings, cli_args=arguments, cli_settings_source=source)
    except ValidationError as error:
        raise StartupError("; ".join(map(_describe, error.errors()))) from error
    except (SettingsError, ValueError) as error:
        raise StartupError(" ".join(str(error).split())) from error


class _GroupedHelp:
    """Show each flag in --help under the title of the class that declares it."""

    def __init__(self) -> None:
        self._groups: dict[str, argparse._ArgumentGroup] = {}

    def __call__(
        self, parser: argparse._ActionsContainer, *names: str, **options: Any
    ) -> argparse.Action:
        name = options.get("dest")
        for title, group in GROUPS.items():
            if name in group.__annotations__:
                if title not in self._groups:
                    self._groups[title] = parser.add_argument_group(title, group.__doc__)
                return self._groups[title].add_argument(*names, **options)
        return parser.add_argument(*names, **options)


def _check_removed(arguments: list[str], config: str | None) -> None:
    """Raise StartupError for a setting of an earlier version, wherever it is set."""
    flags = {argument.partition("=")[0] for argument in arguments}
    in_file = tomllib.loads(Path(config).read_text()) if config else {}
    for name, advice in _REMOVED.items():
        flag = _flag(name)
        if flag in flags or f"CONVOY_{name.upper()}" in os.environ or name in in_file:
            raise StartupError(f"{flag}: removed; {advice}")


def _check_environment() -> None:
    """Raise StartupError for a variable that looks like a setting but is not one.

    A misspelled limit or token file would otherwise be ignored silently.
    """
    prefix = "CONVOY_"
    known = {f"{prefix}{name.upper()}" for name in ServerSettings.model_fields}
    for variable, value in sorted(os.environ.items()):
        name = variable.upper()
        if not name.startswith(prefix) or name in known | _OTHER_VARIABLES:
            continue
        if not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            advice = _nearest(name.removeprefix(prefix), lambda field: prefix + field.upper())
            raise StartupError(f"{variable}: no such setting; {advice}")


def _nearest(name: str, shown: Callable[[str], str]) -> str:
    """Return the most similar setting, in the form of that source."""
    found = difflib.get_close_matches(name.lower(), sorted(ServerSettings.model_fields), n=1)
    return f"did you mean {shown(found[0])}?" if found else "see convoy-server --help"


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _describe(problem: object) -> str:
    assert isinstance(problem, dict)
    name = ".".join(map(str, problem["loc"]))
    flag = _flag(name)
    if problem["type"] == "missing":
        return f"{flag} is required"
    if problem["type"] == "extra_forbidden":
        return f"{flag}: no such setting; {_nearest(name, _flag)}"
    return f"{flag}: {problem['msg'].lower()}, got {problem['input']!r}"
