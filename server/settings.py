"""The server's settings: flags, CONVOY_… environment variables, an optional TOML file."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from server.errors import StartupError

Port = Annotated[int, Field(ge=0, le=65535)]


class ServerSettings(BaseSettings):
    """Serves every model of a repository by gRPC, with dynamic batching and Prometheus metrics.

    Every flag can also be set in the environment (--max-batch-size is CONVOY_MAX_BATCH_SIZE) or in
    the TOML file that CONVOY_CONFIG names (max_batch_size = 32). A flag wins over the environment,
    the environment over the file.
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

    repository: Path = Field(
        description="Folder of models, NAME/VERSION/manifest.json, as convoy-export writes it."
    )
    require_signature: Path | None = Field(
        None,
        description="File with an Ed25519 public key (PEM). Versions that its private half did not "
        "sign (convoy-export --sign-key) are not loaded.",
    )
    version_policy: str = Field(
        "latest:1",
        pattern=r"^(latest(:[1-9][0-9]{0,3})?|all|specific)$",
        description="latest:N serves the default version and the N - 1 before it, all every one, "
        "specific only what convoy-export promote chose. The default version is the promoted one, "
        "or the newest.",
    )
    poll_s: float = Field(
        2.0,
        ge=0,
        description="Seconds between looks into the repository for new versions; 0 looks only at "
        "the start.",
    )
    canary_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the live requests that a newer version is tried on before it takes "
        "over. Callers are answered by the old one meanwhile; the new one's answers are compared "
        "with it. 0: a version that passed its checks takes over at once.",
    )
    canary_requests: int = Field(200, ge=1, description="Requests that make a verdict on a canary.")
    canary_timeout_s: float = Field(
        300.0,
        gt=0,
        description="Seconds after which the verdict is made of the requests there were; a canary "
        "that nothing speaks against then takes over.",
    )
    canary_max_error_ratio: float = Field(
        0.01, ge=0, le=1, description="Share of its requests that a canary may fail on."
    )
    canary_max_slowdown: float = Field(
        1.5, gt=0, description="Times as long as the old version's that its runs may take."
    )
    canary_max_disagreement: float = Field(
        0.1, ge=0, le=1, description="Share of the images that it may put into another class."
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Beyond loopback anyone may send requests."
    )
    port: Port = Field(8001, description="TCP port for gRPC; 0 picks a free one and logs it.")
    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the server's certificate chain; both ports then speak TLS only. "
        "Replaced files count for the next connection.",
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authority that must have signed a client's certificate.",
    )
    token_file: Path | None = Field(
        None,
        description="File with bearer tokens, one a line, one of which every request must bring. "
        "grpc.health.v1, /healthz and /readyz stay open. A token without TLS can be overheard.",
    )
    admin_port: Port | None = Field(
        None,
        description="TCP port for the RPCs that index, load and unload models; 0 picks a free one. "
        "There is none by default.",
    )
    admin_token_file: Path | None = Field(
        None, description="File with bearer tokens for the admin port, which demands one."
    )
    channelz: bool = Field(
        False,
        description="Whether the admin port also tells of every connection and call (channelz); "
        "needs --transport grpcio, whose C core does the counting.",
    )
    http_port: Port = Field(
        8002,
        description="TCP port for the page, the REST face, /metrics, /healthz and /readyz; 0 picks "
        "a free one.",
    )
    ui: bool = Field(True, description="Whether the HTTP port also serves a page to look at.")
    transport: Literal["native", "grpcio"] = Field(
        "native",
        description="What carries gRPC: native runs on the server's own event loop and costs a "
        "fraction of the processor time per call; grpcio is gRPC's C core.",
    )
    front_ends: int = Field(
        0,
        ge=0,
        le=256,
        description="Processes that answer gRPC for the one that owns the device, on one port; for "
        "machines with more processors than one process can use. 0: that one answers itself.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu(,cpu)*|cuda:all|cuda(:[0-9]+)?(,cuda(:[0-9]+)?)*)$",
        description="auto, cpu, cuda or cuda:INDEX; several by commas (cuda:0,cuda:1) or cuda:all "
        "share one queue. auto takes CUDA where there is a device; an explicit cuda that cannot be "
        "used ends the start, it never falls back to the CPU.",
    )
    backend: Literal["onnx", "openvino", "torchscript", "exported-program", "aot-inductor"] = Field(
        "onnx",
        description="What runs the model. openvino runs the ONNX artefact too, on a CPU, at larger "
        "batches of some nets the faster of the two. The others run torch's artefacts, with torch.",
    )
    precision: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        "fp32",
        description="Which variant of the artefact runs, of those that convoy-export --precision "
        "wrote: fp16 and bf16 on CUDA, int8 on a CPU.",
    )
    cuda_graphs: bool = Field(
        False,
        description="With --backend onnx on CUDA: capture a graph of each batch size and replay "
        "it, over buffers that stay on the device. Experimental.",
    )
    slo_ms: float = Field(
        0.0,
        ge=0,
        description="Milliseconds in which a request is to be answered after it came; a caller's "
        "earlier deadline stands. What cannot be answered in time is refused at once with "
        "DEADLINE_EXCEEDED, and batches are no larger than it allows. 0: callers' deadlines only.",
    )
    max_batch_size: int = Field(
        0,
        ge=0,
        le=4096,
        description="Upper bound of the images in one batch. 0: the server measures at start which "
        "size is worth it; within the bound it does so as well.",
    )
    max_request_images: int = Field(
        256,
        ge=1,
        le=65536,
        description="Images that one request may bring; it is split over batches.",
    )
    max_queue_delay_ms: float = Field(
        0.0,
        ge=0,
        description="Milliseconds that a free model instance waits for a fuller batch. Above 0 it "
        "trades latency for larger batches; 0 still batches whatever waits.",
    )
    max_queue_size: int = Field(
        1024,
        ge=1,
        description="Images that may wait per model. Further requests are refused at once with "
        "RESOURCE_EXHAUSTED; a longer queue means later answers, not more of them.",
    )
    max_queue_mb: float = Field(
        256.0, gt=0, description="MiB of pixels that may wait per model, refused likewise beyond."
    )
    max_client_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Part of the queue that the requests of one client may hold; clients are told "
        "apart by their address. Leave it at 1 behind a proxy, which has one address for all.",
    )
    hang_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds after which a run on the device is taken for dead: the model reports "
        "NOT_SERVING and whoever waits for it gets UNAVAILABLE.",
    )
    instances: int = Field(
        0,
        ge=0,
        description="Threads that run batches of one model side by side on each device. 0: two on "
        "CUDA (one with --cuda-graphs), one for each processor, at most two, on a CPU.",
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="Largest encoded image, width x height in pixels, that is decoded. Bounds the "
        "memory one request can take, about 4 bytes a pixel.",
    )
    max_message_mb: float = Field(
        16.0,
        gt=0,
        le=2047,
        description="Largest gRPC message in MiB. Raised by itself where a full batch needs more.",
    )
    lame_duck_seconds: float = Field(
        0.0,
        ge=0,
        description="Seconds that the server answers on after SIGTERM while it reports "
        "NOT_SERVING, so that load balancers turn away before it refuses.",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="Seconds that accepted requests get to finish after SIGTERM."
    )
    otlp_endpoint: str = Field(
        "",
        description="URL that OpenTelemetry traces are sent to, OTLP over HTTP, such as "
        "http://127.0.0.1:4318/v1/traces; needs the extra otel. Empty: no traces.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="How log lines are written to stderr."
    )

    @property
    def slo_s(self) -> float:
        """In which time a request is to be answered; infinity without an objective."""
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
        """Reads flags, then the environment, then the TOML file."""
        toml = TomlConfigSettingsSource(settings_cls, os.environ.get("CONVOY_CONFIG"))
        return init_settings, env_settings, toml


def parse_settings(arguments: list[str]) -> ServerSettings:
    """Reads the settings for a command line.

    Raises:
        StartupError: A setting is missing, unknown or out of range; the message is one line.
    """
    config = os.environ.get("CONVOY_CONFIG")
    if config and not Path(config).is_file():
        raise StartupError(f"CONVOY_CONFIG: expected a TOML file, got {config!r}")
    try:
        return CliApp.run(ServerSettings, cli_args=arguments)
    except ValidationError as error:
        raise StartupError("; ".join(map(_describe, error.errors()))) from error
    except (SettingsError, ValueError) as error:
        raise StartupError(" ".join(str(error).split())) from error


def _describe(problem: object) -> str:
    assert isinstance(problem, dict)
    flag = "--" + ".".join(map(str, problem["loc"])).replace("_", "-")
    if problem["type"] == "missing":
        return f"{flag} is required"
    return f"{flag}: {problem['msg'].lower()}, got {problem['input']!r}"
