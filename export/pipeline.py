"""From a source to a published version: write, prove, describe, publish."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from convoy.v1 import model_manifest_pb2 as pb
from export import (
    aot_inductor,
    exported_program,
    golden,
    int8,
    manifest,
    onnx_format,
    onnx_import,
    report,
    signing,
    torchscript,
)
from export.cost import measure_latencies
from export.formats import ArtefactFormat, Precision, Variant
from export.manifest import ProvedArtefact
from export.onnx_import import OnnxNet
from export.proof import GATES, Expectation, Parity, expect, prove
from export.publishing import ModelFolder
from export.samples import Samples
from export.servable import Images, Run, Servable
from export.source import ModelSource
from export.threads import one_thread


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to write.

    Attributes:
        variants: One artefact of each, the float32 ones first.
        script: TorchScript from source code in place of a trace.
        abstain_below: Largest probability below which the model had better not answer; 0 for never.
        signing_key: Signs the manifest.
    """

    variants: Sequence[Variant] = (
        Variant(ArtefactFormat.ONNX),
        Variant(ArtefactFormat.TORCHSCRIPT),
    )
    script: bool = False
    abstain_below: float = 0.0
    signing_key: Ed25519PrivateKey | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A version as it lies in the repository."""

    path: Path
    manifest: pb.ModelManifest
    parities: dict[Variant, Parity]


_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}

LOADERS: dict[ArtefactFormat, Callable[[Path], Run]] = {
    ArtefactFormat.ONNX: onnx_format.load,
    ArtefactFormat.TORCHSCRIPT: torchscript.load,
    ArtefactFormat.EXPORTED_PROGRAM: exported_program.load,
    ArtefactFormat.AOT_INDUCTOR: aot_inductor.load,
}
"""How each format is run here."""


@one_thread()
def export(
    source: ModelSource, proof_data: Samples, target: ModelFolder, options: ExportOptions
) -> Published:
    """Publishes a source as the next version of a model, if every artefact passes its gate.

    Raises:
        UnsupportedNetError: A format cannot express the net.
        ParityError: An artefact failed its gate.
        PublishError: The repository cannot be written to.
    """
    expected = expect(source, proof_data)
    with target.stage() as staged:
        workbench = _Workbench(source, target.name, staged, expected, proof_data.calibration.images)
        artefacts = [workbench.make(variant, options) for variant in options.variants]
        samples = staged / manifest.SAMPLES_NAME
        count = golden.write(samples, expected, proof_data.pictures)
        page = staged / manifest.REPORT_NAME
        report.write(page, target.name, source, expected, artefacts)
        described = manifest.build(
            source,
            artefacts,
            samples=samples,
            samples_count=count,
            report=page,
            created_at=datetime.now(UTC),
        )
        described.name = target.name
        described.abstain_threshold = options.abstain_below

        def seal(folder: Path, version: int) -> None:
            described.version = version
            (folder / manifest.MANIFEST_NAME).write_bytes(manifest.to_json(described))
            if options.signing_key:
                signing.sign(folder, options.signing_key)

        version = target.publish(staged, seal)
    parities = {artefact.variant: artefact.parity for artefact in artefacts}
    return Published(target.path / str(version), described, parities)


@dataclass(frozen=True, slots=True)
class _Workbench:
    source: ModelSource
    name: str
    folder: Path
    expected: Expectation
    calibration: Images

    def make(self, variant: Variant, options: ExportOptions) -> ProvedArtefact:
        """Writes an artefact and proves the file itself, which is what will be served."""
        path = self.folder / variant.file_name
        self._write(variant, path, options)
        run = LOADERS[variant.format](path)
        parity = prove(path.name, run, self.expected, GATES[variant.precision])
        return ProvedArtefact(
            variant, path, parity, measure_latencies(run, self.expected.images[0])
        )

    def _write(self, variant: Variant, path: Path, options: ExportOptions) -> None:
        if variant.precision is Precision.INT8:
            float_path = self.folder / Variant(variant.format).file_name
            int8.quantize(float_path, path, self.calibration)
            return
        data, dtype = self.source.data, _DTYPES[variant.precision]
        description = self.source.describe(self.name)
        if isinstance(self.source.net, OnnxNet):
            graph = onnx_import.wrap(self.source.net.graph, data, self.source.temperature)
            onnx_format.save(graph, path, description)
            return
        servable = Servable(
            self.source.net, data.mean, data.std, self.source.temperature, dtype
        ).eval()
        example = torch.from_numpy(self.expected.images[:2])  # [2, H, W, 3] uint8
        match variant.format:
            case ArtefactFormat.ONNX:
                onnx_format.write(servable, example, path, description)
            case ArtefactFormat.TORCHSCRIPT:
                torchscript.write(servable, example, path, description, options.script)
            case ArtefactFormat.EXPORTED_PROGRAM:
                exported_program.write(servable, example, path, description)
            case ArtefactFormat.AOT_INDUCTOR:
                aot_inductor.write(servable, example, path, description)
