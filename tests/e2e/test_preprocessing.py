"""Training, server and batch bring a file to pixels by three implementations of one text."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import resize

from convoy.client import ClassScore, Client
from convoy.client.batch.decoding import Preprocessing as BatchSteps
from convoy.client.batch.decoding import decode
from convoy.export.formats import ArtifactFormat, Variant
from convoy.export.pipeline import ExportOptions, export
from convoy.export.repository import ModelFolder
from convoy.export.samples import load_samples
from convoy.export.source import from_checkpoint
from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation
from convoy.server.models.manifest import Preprocessing as ServerSteps
from convoy.training import checkpoints, nets
from convoy.training.checkpoints import Architecture, Checkpoint, DataDescription
from convoy.training.data import load_data
from convoy.training.data.folder import list_images
from convoy.training.data.image_file import decode_rgb
from convoy.training.data.images import Preprocessing as TrainingSteps
from convoy.training.data.images import preprocess, read_and_look, read_image
from convoy.training.evaluate import predict
from convoy.training.normalization import Normalization
from tests.image_files import encode, exif
from tests.processes import ServerProcess, running_server

STEPS = [(32, 32, 0), (32, 32, 36), (224, 224, 256), (24, 40, 48)]
FILTERS = {
    ("bilinear", True): Interpolation.BILINEAR,
    ("bicubic", True): Interpolation.BICUBIC,
    ("bilinear", False): Interpolation.BILINEAR,
}


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colors with noise: every filter and rounding leaves its mark."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([rows, columns, (rows + columns) / 2], axis=-1) * 200
    noise = np.random.default_rng(height * width).integers(0, 56, (height, width, 3))
    return Image.fromarray((smooth + noise).astype(np.uint8))


def files(folder: Path) -> list[Path]:
    """Odd sizes, formats and modes, as people's folders have them."""
    turned = Image.Exif()
    turned[0x0112] = 8
    photo, tall, small = photograph(301, 457), photograph(643, 211), photograph(17, 13)
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 200)
    transparent = small.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(small.size))
    saved = {
        "photo.jpg": (photo, {"quality": 88}),
        "turned.jpg": (photo, {"exif": turned.tobytes()}),
        "cmyk.jpg": (tall.convert("CMYK"), {}),
        "gray.png": (tall.convert("L"), {}),
        "deep.png": (deep, {}),
        "palette.gif": (photo, {}),
        "transparent.png": (transparent, {}),
        "picture.webp": (tall, {}),
        "picture.bmp": (small, {}),
        "exact.png": (photograph(32, 32), {}),
    }
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    return [folder / name for name in saved]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("interpolation", "antialias"), FILTERS)
def test_server_and_batch_see_what_training_saw(tmp_path, steps, interpolation, antialias):
    ours = ServerSteps(*steps, FILTERS[interpolation, antialias], antialias)
    theirs = TrainingSteps(*steps, interpolation, antialias)
    local = BatchSteps(*steps, Image.Resampling[interpolation.upper()], antialias)
    for path in files(tmp_path):
        served = decode_image(path.read_bytes(), ours, max_pixels=10_000_000)[0]
        trained = read_image(path, theirs)
        np.testing.assert_array_equal(served, trained, err_msg=path.name)
        assert served.shape == (*steps[:2], 3)
        for form in (str(path), path.read_bytes()):
            np.testing.assert_array_equal(decode(form, local), trained, err_msg=path.name)


@pytest.mark.parametrize("steps", STEPS)
def test_scaled_decoding_is_the_same_everywhere_and_close_to_all_pixels(tmp_path, steps):
    ours = ServerSteps(*steps, Interpolation.BILINEAR, scaled_decoding=True)
    theirs = TrainingSteps(*steps, decode="scaled")
    local = BatchSteps(*steps, Image.Resampling.BILINEAR, scaled_decoding=True)
    large = tmp_path / "large.jpg"
    photograph(1000, 1500).save(large, quality=88)
    for path in [*files(tmp_path), large]:
        served = decode_image(path.read_bytes(), ours, max_pixels=10_000_000)[0]
        trained, look = read_and_look(path, theirs)
        np.testing.assert_array_equal(served, trained, err_msg=path.name)
        np.testing.assert_array_equal(decode(str(path), local), trained, err_msg=path.name)
        exact, exact_look = read_and_look(path, TrainingSteps(*steps))
        assert look == exact_look
        is_scaled = path.suffix == ".jpg" and max(steps) < 100
        assert (trained != exact).any() == (is_scaled or path == large), path.name
        assert np.abs(trained.astype(int) - exact).mean() < 2


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_large_enough():
    encoded = encode(photograph(1000, 1500), "JPEG", exif=exif(6))
    # Upright it is 1000 px wide and 1500 px high.
    for size_px, shorter_px, expected in (
        ((32, 32), 0, (125, 188)),
        ((126, 32), 0, (250, 375)),
        ((224, 224), 256, (500, 750)),
        ((500, 751), 0, (1000, 1500)),
        ((2000, 2000), 0, (1000, 1500)),
    ):
        assert decode_rgb(encoded, scaled_for=(size_px, shorter_px)).size == expected


@pytest.mark.parametrize("size", [(301, 457), (643, 211), (17, 13), (32, 32)])
def test_without_antialias_the_pixels_are_those_of_opencv_and_torchvision(size):
    image = photograph(*size)
    found = preprocess(image, TrainingSteps(48, 40, 0, antialias=False)).astype(int)
    opencv = cv2.resize(np.asarray(image), (40, 48), interpolation=cv2.INTER_LINEAR)
    assert np.abs(found - opencv).max() <= 1
    cropped = preprocess(image, TrainingSteps(48, 40, 64, antialias=False)).astype(int)
    scale = 64 / min(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    resized = resize(tensor, [height, width], antialias=False)
    top, left = (height - 48) // 2, (width - 40) // 2
    expected = resized[:, top : top + 48, left : left + 40].permute(1, 2, 0).numpy()
    assert np.abs(cropped - expected).max() <= 1


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 0.1
MODELS = {
    "small": (Architecture("net", {"n_classes": 2}), TrainingSteps(decode="scaled")),
    "large": (
        Architecture("resnet18", {"n_classes": 2}),
        TrainingSteps(224, 224, 256, "bicubic"),
    ),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd-sized cuttings of scikit-learn's two photographs, as JPEG files."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = random.integers(120, 420, 2) | 1
                top, left = (random.integers(0, n) for n in (428 - height, 641 - width))
                cutting = Image.fromarray(pixels[top : top + height, left : left + width])
                cutting.save(folder / f"{index}.jpg", quality=int(random.integers(60, 96)))
    return root


def save_checkpoint(name: str, spec: str, path: Path) -> None:
    """Saves a net whose answers differ from photograph to photograph."""
    torch.manual_seed(0)
    architecture, steps = MODELS[name]
    net = nets.create(architecture.name, **architecture.arguments)
    pixels = torch.from_numpy(load_data(spec, steps).train.images)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        # Batch norms that have seen nothing let the signal of a fresh net die.
        for _ in range(5):
            net(Normalization(MEAN, STD).apply(pixels))
    data = DataDescription(spec, ("china", "flower"), MEAN, STD, steps)
    checkpoints.save(
        path, Checkpoint(net.state_dict(), architecture, data, {}, temperature=TEMPERATURE)
    )


def probabilities_in_training(path: Path, spec: str, steps: TrainingSteps) -> np.ndarray:
    """What training's own evaluation says about the test photographs `[N, 2]`."""
    checkpoint = checkpoints.load(path)
    images = torch.from_numpy(load_data(spec, steps).test.images)
    logits = predict(checkpoint.build_net(), [Normalization(MEAN, STD).apply(images)])
    return torch.softmax(logits / TEMPERATURE, 1).numpy()


@pytest.fixture(scope="module")
def served(
    photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Path]]:
    """A server of both models, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("served")
    spec = f"imagefolder:{photographs}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in MODELS:
            path = folder / f"{name}.pt"
            save_checkpoint(name, spec, path)
            source = from_checkpoint(path)
            samples = load_samples(spec, source.data.classes, source.data.preprocessing)
            target = ModelFolder(folder / "models", name)
            export(source, samples, target, ExportOptions([Variant(ArtifactFormat.ONNX)]))
        with running_server(folder / "models", "--device", "cpu") as server:
            yield server, folder


@pytest.mark.parametrize("name", MODELS)
def test_served_results_are_those_of_training_on_the_same_photographs(
    name: str,
    served: tuple[ServerProcess, Path],
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server, folder = served
    steps = MODELS[name][1]
    paths = list_images(photographs / "test").paths
    with Client(server.address) as client:
        answers = [client.classify(path, model=name, top_k=2) for path in paths]
    found = [[score.probability for score in sorted(a.classes, key=by_index)] for a in answers]
    spec = f"imagefolder:{photographs}"
    expected = probabilities_in_training(folder / f"{name}.pt", spec, steps)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    stretched = TrainingSteps(steps.height_px, steps.width_px, 2 * steps.height_px)
    skewed = probabilities_in_training(folder / f"{name}.pt", spec, stretched)
    assert np.abs(skewed - expected).max() > 0.01, "the net must notice another preprocessing"


def by_index(score: ClassScore) -> int:
    return score.index
