"""From a source to a published version: write, prove, describe, publish."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from convoy.export import (
    int8,
    manifest,
    onnx_format,
    onnx_import,
    report,
    signing,
    tf32,
    torch_export,
    torchscript,
)
from convoy.export.cost import (
    LARGE_MULTIPLY_ADDS,
    BatchLatency,
    count_multiply_adds,
    measure_latencies,
    run_threads,
)
from convoy.export.errors import InputError, ParityError, runtime_reason
from convoy.export.formats import ArtifactFormat, Precision, Variant
from convoy.export.manifest import ProvedArtifact
from convoy.export.onnx_import import OnnxNet
from convoy.export.proof import GATES, Parity, prove
from convoy.export.reference import Expectation, doubts, expect
from convoy.export.repository import MANIFEST_NAME, Model
from convoy.export.samples import Samples
from convoy.export.servable import Images, Run, Servable
from convoy.export.source import ModelSource, check_source
from convoy.v1 import model_manifest_pb2 as pb

_log = logging.getLogger(__name__)

_ROWS_PER_SIZE = 64
"""Samples per batch size for slow nets."""
_OPENVINO_BATCH_SIZES = (1, 32)


def _quiet(step: str) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The artifacts to write.

    Attributes:
        variants: One artifact of each, those in the net's own precision first.
        script: Compile TorchScript from source code instead of tracing.
        abstain_below: Largest probability below which replies have the abstain flag; 0: never.
        signing_key: Signs the manifest.
        openvino: Prove ONNX artifacts in OpenVINO too; None does so where it is installed.
        asked_for: Variants that must pass in OpenVINO; for others the result is recorded.
        progress: Called with each step, in words.
    """

    variants: Sequence[Variant] = (
        Variant(ArtifactFormat.ONNX),
        Variant(ArtifactFormat.TORCHSCRIPT),
    )
    script: bool = False
    abstain_below: float = 0.0
    signing_key: Ed25519PrivateKey | None = None
    openvino: bool | None = None
    asked_for: Collection[Variant] = ()
    progress: Callable[[str], None] = _quiet


@dataclass(frozen=True, slots=True)
class Published:
    """A version in the repository.

    Attributes:
        path: Its folder; its URL if it is in an object store.
        parities: The comparison of each artifact with the eager net.
        openvino: The comparison of ONNX artifacts in OpenVINO if installed; a failure as text.
        int8_layers: How many layers of the int8 artifact are in int8, and how many it has.
    """

    path: Path | str
    manifest: pb.ModelManifest
    parities: dict[Variant, Parity]
    openvino: dict[Variant, Parity | str] = field(default_factory=dict)
    int8_layers: tuple[int, int] | None = None


_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.TF32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}

LOADERS: dict[ArtifactFormat, Callable[[Path], Run]] = {
    ArtifactFormat.ONNX: onnx_format.load,
    ArtifactFormat.TORCHSCRIPT: torchscript.load,
    ArtifactFormat.EXPORTED_PROGRAM: torch_export.load,
    ArtifactFormat.AOT_INDUCTOR: torch_export.load_package,
}
"""The function that loads each format."""


def load_artifact(variant: Variant, path: Path) -> Run:
    """Return a function that runs an artifact on this process's CPU as its precision says."""
    if variant.precision is not Precision.TF32:
        return LOADERS[variant.format](path)
    if variant.format is ArtifactFormat.ONNX:
        return tf32.load_onnx(path)
    return tf32.simulate(LOADERS[variant.format](path))


def export(
    source: ModelSource, proof_data: Samples, target: Model, options: ExportOptions
) -> Published:
    """Publish a source as the next version of a model, if every artifact passes its gate.

    Raises:
        InputError: A server would not load the source.
        UnsupportedNetError: A format cannot express the net.
        ParityError: An artifact failed its gate, in OpenVINO too where it was asked for.
        PublishError: The repository cannot be written to.
    """
    check_source(source)
    size = source.data.preprocessing
    options.progress("running the net itself")
    multiply_adds = count_multiply_adds(
        source.net, size.height_px, size.width_px, source.channel_order.channels
    )
    with run_threads(multiply_adds), target.stage() as staged:
        expected = expect(source, proof_data)
        for warning in doubts(expected):
            _log.warning("%s", warning)
        workbench = _Workbench(
            source, target.name, staged, expected, proof_data.calibration.images, multiply_adds
        )
        artifacts = [workbench.make(variant, options) for variant in options.variants]
        verdicts = workbench.ask_openvino(artifacts, options)
        described = workbench.describe(artifacts, proof_data.pictures, verdicts)
        described.abstain_threshold = options.abstain_below
        layers = [
            int8.count_layers(each.path) for each in artifacts if each.variant == int8.VARIANT
        ]

        def seal(folder: Path, version: int) -> None:
            described.version = version
            manifest.check(described)
            (folder / MANIFEST_NAME).write_bytes(manifest.to_json(described))
            if options.signing_key:
                signing.sign(folder, options.signing_key)

        version = target.publish(staged, seal)
    parities = {artifact.variant: artifact.parity for artifact in artifacts}
    return Published(
        target.location(version), described, parities, verdicts, next(iter(layers), None)
    )


@dataclass(frozen=True, slots=True)
class _Workbench:
    source: ModelSource
    name: str
    folder: Path
    expected: Expectation
    calibration: Images
    multiply_adds: int

    def make(self, variant: Variant, options: ExportOptions) -> ProvedArtifact:
        """Write an artifact, unless it shares a file, and verify the file, which will be served."""
        path = self.folder / variant.file_name
        if variant.precision is Precision.INT8 and self.source.precision is not Precision.INT8:
            parity = self._quantize(variant, path, options)
        else:
            if not path.exists():
                options.progress(f"writing {path.name}")
                self._write(variant, path, options)
            parity = self._prove(variant, path, options)
        options.progress(f"timing {path.name}")
        return ProvedArtifact(variant, path, parity, self._latencies(variant, path))

    def _prove(self, variant: Variant, path: Path, options: ExportOptions) -> Parity:
        return prove(
            variant.title,
            _load(variant, path),
            self.expected,
            GATES[variant.precision],
            rows_per_size=self._rows_per_size,
            progress=options.progress,
        )

    def _quantize(self, variant: Variant, path: Path, options: ExportOptions) -> Parity:
        """Write the first int8 graph that passes its gate, and name its layers in float32.

        Raises:
            InputError: There are no images to calibrate with.
            ParityError: None passes.
        """
        if not len(self.calibration):
            raise InputError(
                "precision int8: expected real images for the calibration, by --data or --images"
            )
        options.progress(f"writing {path.name}")
        float_path = self.folder / Variant(variant.format).file_name
        failure = ""
        for attempt in int8.attempts(float_path, self.calibration, options.progress):
            path.write_bytes(attempt.graph.SerializeToString())
            try:
                parity = self._prove(variant, path, options)
            except ParityError as error:
                layers = "{} of {} layers".format(*int8.count_layers(path))
                failure = f"{error}, with {layers} in int8"
                continue
            if attempt.in_float:
                _log.warning(
                    "%s: int8 changes the logits too much in %d layers, which stay in float32: %s",
                    path.name,
                    len(attempt.in_float),
                    ", ".join(attempt.in_float),
                )
            return parity
        raise ParityError(failure)

    def ask_openvino(
        self, artifacts: Sequence[ProvedArtifact], options: ExportOptions
    ) -> dict[Variant, Parity | str]:
        """Verify the ONNX artifacts with OpenVINO too, because a server may run them with it.

        Its failure is only a warning for an artifact that no flag names, since ONNX Runtime runs
        the file.

        Raises:
            ParityError: A requested artifact fails.
        """
        installed = onnx_format.openvino_is_installed()
        if options.openvino and not installed:
            raise InputError("openvino: expected it to be installed: pip install openvino")
        if not installed or options.openvino is False:
            return {}
        verdicts: dict[Variant, Parity | str] = {}
        for artifact in artifacts:
            # On a CPU the file of TF32 is that of float32.
            variant = artifact.variant
            if variant.format is not ArtifactFormat.ONNX or variant.precision is Precision.TF32:
                continue
            where = f"{artifact.path.name} with OpenVINO"
            try:
                verdicts[artifact.variant] = prove(
                    where,
                    onnx_format.load_in_openvino(artifact.path),
                    self.expected,
                    GATES[artifact.variant.precision],
                    batch_sizes=_OPENVINO_BATCH_SIZES,
                    rows_per_size=_ROWS_PER_SIZE,
                    progress=options.progress,
                )
            # OpenVINO's exceptions for unreadable files have no common base.
            except Exception as error:
                reason = runtime_reason(error)
                reason = reason if where in reason else f"{where}: {reason}"
                if artifact.variant in options.asked_for:
                    raise ParityError(f"{reason}; --no-openvino publishes it anyway") from error
                verdicts[artifact.variant] = reason
                _log.warning("%s; do not serve it with --backend openvino", reason)
        return verdicts

    def describe(
        self,
        artifacts: Sequence[ProvedArtifact],
        pictures: Sequence[bytes],
        verdicts: Mapping[Variant, Parity | str],
    ) -> pb.ModelManifest:
        """Write golden samples and report, and return the manifest without a version."""
        samples = self.folder / manifest.SAMPLES_NAME
        count = _write_golden_samples(samples, self.expected, pictures)
        page = self.folder / manifest.REPORT_NAME
        report.write(page, self.name, self.source, self.expected, artifacts)
        described = manifest.build(
            self.source,
            artifacts,
            verdicts,
            samples=samples,
            samples_count=count,
            report=page,
            multiply_adds=self.multiply_adds,
            created_at=datetime.now(UTC),
        )
        described.name = self.name
        return described

    @property
    def _rows_per_size(self) -> int | None:
        return _ROWS_PER_SIZE if self.multiply_adds >= LARGE_MULTIPLY_ADDS else None

    def _latencies(self, variant: Variant, path: Path) -> tuple[BatchLatency, ...]:
        # The manifest states times on one thread, and a session keeps its number of threads.
        # Of TF32 they are those of float32: the simulation takes longer than either.
        with run_threads(0):
            return measure_latencies(LOADERS[variant.format](path), self.expected.images[0])

    def _write(self, variant: Variant, path: Path, options: ExportOptions) -> None:
        data = self.source.data
        description = self.source.describe(self.name)
        if isinstance(self.source.net, OnnxNet):
            graph = onnx_import.wrap(self.source, self.source.net)
            onnx_format.save(graph, path, description)
            return
        servable = Servable(
            self.source.net,
            data.mean,
            data.std,
            self.source.temperature,
            dtype=_DTYPES[variant.precision],
            output=self.source.output,
            channel_order=self.source.channel_order,
        ).eval()
        example = torch.from_numpy(self.expected.images[:2])  # [2, H, W, 3] uint8
        match variant.format:
            case ArtifactFormat.ONNX:
                onnx_format.write(servable, example, path, description)
            case ArtifactFormat.TORCHSCRIPT:
                torchscript.write(servable, example, path, description, options.script)
            case ArtifactFormat.EXPORTED_PROGRAM:
                torch_export.write(servable, example, path, description)
            case ArtifactFormat.AOT_INDUCTOR:
                torch_export.write_package(servable, example, path, description)


def _load(variant: Variant, path: Path) -> Run:
    try:
        return load_artifact(variant, path)
    # The runtimes' exceptions have no common base.
    except Exception as error:
        raise ParityError(f"{path.name}: cannot be loaded: {runtime_reason(error)}") from error


def _write_golden_samples(path: Path, expected: Expectation, pictures: Sequence[bytes]) -> int:
    """Write pictures as tensors and as files, with the eager net's logits; return their number.

    The manifest's message GoldenSamples lists the arrays; none needs pickle.

    Args:
        path: The .npz file.
        expected: Its last real samples are the decoded pictures.
        pictures: Image files.
    """
    rows = slice(expected.real_count - len(pictures), expected.real_count)
    np.savez(
        path,
        images=expected.images[rows],  # [n, H, W, 3] uint8
        logits=expected.outputs.logits[rows],  # [n, K] float32
        probabilities=expected.outputs.probabilities[rows],  # [n, K] float32
        labels=expected.labels[rows],  # [n] int64
        encoded=np.frombuffer(b"".join(pictures), np.uint8),
        encoded_offsets=np.cumsum([0, *map(len, pictures)], dtype=np.int64),  # [n + 1]
    )
    return len(pictures)
