"""A model version written by hand: the server must need nothing of export but the contract."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from convoy.server.models.manifest import SCHEMA_VERSION

HEIGHT, WIDTH, CLASSES = 4, 6, 3
Publish = Callable[..., Path]


def mean_color_logits(images: np.ndarray) -> np.ndarray:
    """What the hand-made model computes: the mean of each channel, 0 to 1."""
    return images.mean(axis=(1, 2), dtype=np.float64) / 255


def write_model(path: Path) -> None:
    """Writes an ONNX graph whose logits are the mean red, green and blue."""
    scale = numpy_helper.from_array(np.array(255, np.float32), "scale")
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    shape, scores = ["batch", HEIGHT, WIDTH, 3], ["batch", CLASSES]
    graph = helper.make_graph(
        nodes,
        "mean-color",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, scores)
            for name in ("logits", "probabilities")
        ],
        [scale, axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


def write_samples(path: Path) -> None:
    """Writes eight pictures twice as high as the model's images, and what they are resized to."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 2 * HEIGHT, WIDTH, 3), np.uint8)
    pictures = [Image.fromarray(each) for each in pixels]
    resized = [each.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR) for each in pictures]
    images = np.stack([np.asarray(each) for each in resized])
    files = [encode_png(each) for each in pictures]
    np.savez(
        path,
        images=images,
        logits=mean_color_logits(images).astype("f4"),
        encoded=np.frombuffer(b"".join(files), np.uint8),
        encoded_offsets=np.cumsum([0, *map(len, files)]),
    )


def encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def change_samples(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Lets a function change the golden samples of a version, and seals it again."""
    with np.load(folder / "samples.npz") as samples:
        arrays = dict(samples)
    change(arrays)
    np.savez(folder / "samples.npz", **arrays)
    seal(folder)


def file_record(path: Path) -> dict[str, object]:
    """The manifest's entry for a file."""
    content = path.read_bytes()
    return {
        "name": path.name,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def describe(folder: Path) -> dict[str, object]:
    """The manifest of a version in folder NAME/VERSION."""
    scores = {"datatype": "FP32", "shape": [-1, CLASSES]}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": folder.parent.name,
        "version": int(folder.name),
        "input": {"name": "image", "datatype": "UINT8", "shape": [-1, HEIGHT, WIDTH, 3]},
        "outputs": [{"name": "logits", **scores}, {"name": "probabilities", **scores}],
        "labels": ["red", "green", "blue"],
        "preprocessing": {
            "height_px": HEIGHT,
            "width_px": WIDTH,
            "interpolation": "INTERPOLATION_BILINEAR",
        },
        "temperature": 1.0,
        "artefacts": [
            {
                "format": "ARTEFACT_FORMAT_ONNX",
                "file": file_record(folder / "model.onnx"),
                "parity": {"tolerance": 1e-4},
            }
        ],
        "samples": {"file": file_record(folder / "samples.npz"), "count": 8},
    }


def seal(folder: Path, **changes: object) -> None:
    """Writes the manifest of the files as they are now, with changes to it."""
    manifest = {**describe(folder), **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def publish_version(folder: Path) -> Path:
    """Writes a whole version into folder NAME/VERSION and returns it."""
    folder.mkdir(parents=True)
    write_model(folder / "model.onnx")
    write_samples(folder / "samples.npz")
    seal(folder)
    return folder


def mount(folder: Path, data: str) -> None:
    """Lays files out as Kubernetes mounts them: links through a link that is replaced."""
    (folder / data).mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]:
        path.rename(folder / data / path.name)
        path.symlink_to(f"..data/{path.name}")
    (folder / "..next").symlink_to(data)
    (folder / "..next").replace(folder / "..data")


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Publishes `colors` (or another name) in a version, by one rename as export does.

    `spoil` is called with the folder before it is renamed.
    """

    def write(
        version: int = 1, name: str = "colors", spoil: Callable[[Path], object] | None = None
    ) -> Path:
        staged = publish_version(tmp_path / "staged" / name / str(version))
        if spoil:
            spoil(staged)
        folder = tmp_path / "models" / name / str(version)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return staged.rename(folder)

    return write
