"""Publishes real nets in every format, serves each artifact and compares it.

    python -m benchmarks.model_zoo [--folder build/model-zoo] [--document docs/models.md] [NET …]

The weights are random but for a fitted last layer. Each net is exported as ONNX, TorchScript and
.pt2 in float32, and as ONNX in int8. The server's loader verifies each artifact as before
readiness, ONNX with OpenVINO too. The table gives the largest difference of a logit from the source
net's by its own runtime on digits, relative to the largest logit; how many layers are in int8; the
time of the export with its proof; images/s of batches of 8 on one thread; and how many processors
other processes kept busy meanwhile. A result is kept in the folder; a second run measures only what
is missing. The cheap nets come first; the table is written after each.
"""

import argparse
import json
import shutil
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from benchmarks.fitted_heads import fit
from benchmarks.processes import OtherWork
from convoy.export.description import InputDescription
from convoy.export.errors import ExportError
from convoy.export.foreign import read_foreign
from convoy.export.formats import ArtifactFormat, Precision
from convoy.export.pipeline import Published
from convoy.export.publisher import Order, publish_source
from convoy.export.reference import expect
from convoy.export.repository import ModelFolder
from convoy.export.samples import load_samples
from convoy.export.source import ModelSource, describe_timm, from_weights
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.errors import ConvoyError
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.server.models.repository import VerifiedFile
from convoy.training import nets

LABELS = tuple("0123456789")
# Small, since the proof of each artifact takes some hundred images.
SIZE_PX = 64
BATCH_SIZE = 8
ROUNDS = 5
SAMPLES = 64
SMALL = (
    *("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "resnet18"),
    *("timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224", "timm:convnext_atto"),
    *("timm:mobilenetv4_conv_small", "timm:efficientnet_lite0", "timm:resnet26"),
    *("timm:mixer_s16_224", "timm:ghostnet_100", "mobilenet_v2", "regnet_y_400mf", "googlenet"),
)
LARGE = (
    *("efficientnet_b0", "densenet121", "resnet50", "resnext50_32x4d", "alexnet"),
    *("timm:swin_tiny_patch4_window7_224", "swin_t", "convnext_tiny", "swin_v2_t"),
    *("efficientnet_v2_s", "inception_v3", "vit_b_16", "vgg11_bn"),
)
# It takes no less than 75 px.
SIZES_PX = {"inception_v3": 80}
COLUMNS = {
    "onnx": (Runtime.ONNX_RUNTIME, "fp32"),
    "torchscript": (Runtime.TORCHSCRIPT, "fp32"),
    "pt2": (Runtime.EXPORTED_PROGRAM, "fp32"),
    "openvino": (Runtime.OPENVINO, "fp32"),
    "onnx int8": (Runtime.ONNX_RUNTIME, "int8"),
    "openvino int8": (Runtime.OPENVINO, "int8"),
}
MARK = "<!-- make model-zoo -->"


@dataclass(slots=True)
class Result:
    """The results of one net; a column is a text if it failed."""

    name: str
    image_size_px: int = 0
    export_s: float = 0.0
    differences: dict[str, float | str] = field(default_factory=dict)
    images_per_s: dict[str, float] = field(default_factory=dict)
    int8_layers: tuple[int, int] | None = None
    other_processors: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("build/model-zoo"))
    parser.add_argument("--document", type=Path, help="Write the table into this page.")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    makers = all_makers(arguments.folder)
    for name in arguments.nets or makers:
        path = arguments.folder / f"{name.replace(':', '-').replace(' ', '-')}.json"
        if not path.exists():
            result = measure(name, makers[name], arguments.folder)
            path.write_text(json.dumps(asdict(result), indent=1))
        print(row(Result(**json.loads(path.read_text()))), flush=True)
        if arguments.document:
            write_table(arguments.document, arguments.folder)


def all_makers(folder: Path) -> dict[str, Callable[[], ModelSource]]:
    """Return a maker of each source by its name in the table."""
    made: dict[str, Callable[[], ModelSource]] = {}
    made["ONNX of torch.export"] = lambda: onnx_source(folder, dynamo=True)
    made["ONNX of torch.jit"] = lambda: onnx_source(folder, dynamo=False)
    made["Hugging Face ViT"] = lambda: hugging_face_source(folder)
    for name in (*SMALL, *LARGE):
        made[name] = lambda name=name: named_source(name)
    return made


def named_source(name: str) -> ModelSource:
    size_px = SIZES_PX.get(name, SIZE_PX)
    torch.manual_seed(0)
    described = InputDescription(
        labels=LABELS, mean=(0.5,) * 3, std=(0.25,) * 3, image_size_px=(size_px, size_px)
    )
    if name.startswith("timm:"):
        described = described.or_else(describe_timm(name, (size_px, size_px)))
    source = from_weights(None, name, {}, described)
    fit(source.net, source.data)
    return source


def hugging_face_source(folder: Path) -> ModelSource:
    import transformers

    path = folder / "hugging-face-vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIZE_PX,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    transformers.ViTForImageClassification(config).save_pretrained(path)
    steps = {"size": {"height": SIZE_PX, "width": SIZE_PX}, "resample": 2}
    steps |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(steps))
    source = read_foreign(path, InputDescription())
    fit(source.net, source.data)
    return source


def onnx_source(folder: Path, dynamo: bool) -> ModelSource:
    path = folder / f"resnet18-{dynamo}.onnx"
    torch.manual_seed(0)
    described = InputDescription(
        labels=LABELS, mean=(0.5,) * 3, std=(0.25,) * 3, image_size_px=(SIZE_PX, SIZE_PX)
    )
    net = nets.create("resnet18", n_classes=len(LABELS)).eval()
    fit(net, described.complete())
    images = torch.zeros(2, 3, SIZE_PX, SIZE_PX)
    how = (
        {"dynamic_shapes": ({0: "n"},), "external_data": False}
        if dynamo
        else {"dynamic_axes": {"input": {0: "n"}, "output": {0: "n"}}}
    )
    names = {"input_names": ["input"], "output_names": ["output"]}
    torch.onnx.export(net, (images,), path, dynamo=dynamo, verbose=False, **names, **how)
    return read_foreign(path, described)


def measure(name: str, make: Callable[[], ModelSource], folder: Path) -> Result:
    result, others = Result(name), OtherWork()
    try:
        source = make()
    except ExportError as error:
        result.differences = dict.fromkeys(COLUMNS, str(error))
        return result
    result.image_size_px = source.data.preprocessing.height_px
    samples = load_samples("digits", LABELS, source.data.preprocessing, SAMPLES)
    expected = expect(source, samples)
    wanted = (ArtifactFormat.ONNX, ArtifactFormat.TORCHSCRIPT, ArtifactFormat.EXPORTED_PROGRAM)
    formats = [form for form in wanted if form in source.formats]
    target = ModelFolder(folder / "models", name.replace(":", "-").replace(" ", "-"))
    began = time.perf_counter()
    # OpenVINO runs below, so that its failure hides no other result.
    asked = {"samples": SAMPLES, "openvino": False, "data": "digits"}
    published = publish(source, Order(target, formats, [Precision.INT8], **asked))
    versions = {"fp32": published, "int8": published}
    if isinstance(published, str):
        began = time.perf_counter()
        versions["fp32"] = publish(source, Order(target, formats, **asked))
    else:
        result.int8_layers = published.int8_layers
    result.export_s = round(time.perf_counter() - began, 1)
    for column, (runtime, precision) in COLUMNS.items():
        published = versions[precision]
        if isinstance(published, str):
            result.differences[column] = published
            continue
        version = Path(published.path)
        file = next(version.glob(f"{artifact_name(runtime, precision)}"), None)
        if file is None:
            continue
        try:
            serve(version, runtime, precision)
            run = load_backend(
                runtime, VerifiedFile(file.name, file.read_bytes()), Device("cpu"), 1
            ).run
        except ConvoyError as error:
            result.differences[column] = str(error)
            continue
        images = expected.images[: 4 * BATCH_SIZE]
        found = np.concatenate(
            [run(images[start : start + BATCH_SIZE]).logits for start in range(0, 32, BATCH_SIZE)]
        )
        logits = expected.outputs.logits[: len(images)]
        result.differences[column] = float(np.abs(found - logits).max() / np.abs(logits).max())
        result.images_per_s[column] = speed(partial(run, images[:BATCH_SIZE]))
    result.other_processors = round(others.processors(), 1)
    # Keep only the result: the files of thirty nets would fill a disk.
    shutil.rmtree(target.path, ignore_errors=True)
    return result


def publish(source: ModelSource, order: Order) -> Published | str:
    try:
        return publish_source(source, order)
    except ExportError as error:
        return str(error)
    except Exception:
        # A finding of the zoo: an error that the exporter did not foresee.
        return traceback.format_exc()


def artifact_name(runtime: Runtime, precision: str) -> str:
    infix = "" if precision == "fp32" else f".{precision}"
    suffix = {
        Runtime.TORCHSCRIPT: "torchscript",
        Runtime.EXPORTED_PROGRAM: "pt2",
    }.get(runtime, "onnx")
    return f"model{infix}.{suffix}"


def serve(version: Path, runtime: Runtime, precision: str) -> None:
    """Has the server load, warm up and verify a version."""
    limits = BatchingLimits(max_batch_size=BATCH_SIZE, max_queue_size=2 * BATCH_SIZE)
    options = LoadOptions(runtime, (Device("cpu"),), 1, limits, precision=precision)
    ModelLoader(options, ServerMetrics(CollectorRegistry())).load(version)


def speed(call: Callable[[], object]) -> float:
    times_s = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began)
    return round(BATCH_SIZE / statistics.median(times_s), 1)


def row(result: Result) -> str:
    cells = [result.name, f"{result.image_size_px}", f"{result.export_s:.0f}"]
    cells.append(f"{result.other_processors:.1f}")
    cells.append("{} of {}".format(*result.int8_layers) if result.int8_layers else "-")
    for column in COLUMNS:
        found = result.differences.get(column)
        if isinstance(found, float):
            cells.append(f"{found:.0e}, {result.images_per_s[column]:,.0f}/s")
        else:
            cells.append("-" if found is None else "rejected")
    return f"| {' | '.join(cells)} |"


def write_table(document: Path, folder: Path) -> None:
    """Replace the text between the two marks of a page."""
    found = [Result(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    heading = ["net", "px", "export, s", "others", "int8 layers", *COLUMNS]
    lines = [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}", *map(row, found)]
    before, _, rest = document.read_text(encoding="utf-8").partition(MARK)
    after = rest.partition(MARK)[2]
    table = "\n".join(["", *lines, ""])
    document.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
