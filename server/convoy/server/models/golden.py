"""Golden samples: inputs and outputs in a version, which this server must reproduce."""

import io
import zipfile
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from convoy.server.backends.base import Backend
from convoy.server.batching import LatencyModel
from convoy.server.errors import GoldenSamplesError, RequestError, VerificationError
from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Manifest
from convoy.server.models.repository import VerifiedFile
from convoy.server.requests import Images, Outputs

# Releases of Pillow round a resized pixel differently.
_ROUNDING_LEVELS = 1
# The relative error of a few layers' products in TF32, with a margin.
_TF32_ERROR = 0.01
# Of a picture that the page offers as an example.
_MAX_EXAMPLE_BYTES = 256 * 1024
# The size of a large photograph.
_MAX_PIXELS = 50_000_000


@dataclass(frozen=True, slots=True)
class GoldenSamples:
    """The samples that GoldenSamples in model_manifest.proto describes; n samples of K classes.

    Attributes:
        images: `[n, H, W, 3]` uint8.
        logits: `[n, K]` float32, of the original net.
        files: The image files that the images were decoded from.
    """

    images: Images
    logits: NDArray[np.float32]
    files: tuple[bytes, ...]


def examples(golden: GoldenSamples, count: int) -> tuple[bytes, ...]:
    """Return the image files of some samples, of as many different classes as there are.

    Args:
        golden: The samples.
        count: How many to return; fewer where files are larger than 256 KiB.
    """
    small = [n for n, file in enumerate(golden.files) if len(file) <= _MAX_EXAMPLE_BYTES]
    best = golden.logits.argmax(axis=1)
    first = {int(best[n]): n for n in reversed(small)}
    chosen = sorted(first.values()) + [n for n in small if n not in first.values()]
    return tuple(golden.files[n] for n in chosen[:count])


def read_golden_samples(file: VerifiedFile, manifest: Manifest) -> GoldenSamples:
    """Read the samples of a version.

    Raises:
        VerificationError: They are damaged, or of another shape than the manifest states.
    """
    try:
        with np.load(io.BytesIO(file.content), allow_pickle=False) as arrays:
            images, logits = arrays["images"], arrays["logits"]
            encoded, offsets = arrays["encoded"].tobytes(), arrays["encoded_offsets"].tolist()
        files = tuple(encoded[start:end] for start, end in pairwise(offsets))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise VerificationError(
            f"{_where(manifest)}: {file.name}: expected arrays images, logits, encoded and "
            "encoded_offsets"
        ) from error
    shape = manifest.sample_shape
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise VerificationError(
            f"{_where(manifest)}: {file.name}: images: expected uint8 [n, {shape[0]}, {shape[1]}, "
            f"3], got {images.dtype} {list(images.shape)}"
        )
    if len(files) != len(images):
        raise VerificationError(
            f"{_where(manifest)}: {file.name}: encoded_offsets: expected {len(images) + 1} for as "
            f"many images as tensors, got {len(offsets)}"
        )
    return GoldenSamples(images, logits, files)


def check_decoding(golden: GoldenSamples, manifest: Manifest) -> None:
    """Decode the image files like those of requests, and compare with the images.

    Raises:
        GoldenSamplesError: The preprocessing here differs from the exporter's.
    """
    for index, (file, expected) in enumerate(zip(golden.files, golden.images, strict=True)):
        where = f"{_where(manifest)}: image file {index} of the golden samples"
        try:
            decoded = decode_image(file, manifest.preprocessing, _MAX_PIXELS)[0]
        except RequestError as error:
            raise GoldenSamplesError(f"{where}: {error}") from error
        difference = int(np.abs(decoded.astype(np.int16) - expected).max())
        if difference > _ROUNDING_LEVELS:
            raise GoldenSamplesError(
                f"{where}: pixels: decoded by the manifest's preprocessing they differ by "
                f"{difference} from its tensor, expected at most {_ROUNDING_LEVELS}"
            )


def check_answers(
    golden: GoldenSamples,
    backend: Backend,
    manifest: Manifest,
    tolerance: float,
    latency: LatencyModel,
) -> None:
    """Compare the outputs on this device with those of the original net.

    Args:
        golden: The samples.
        backend: The model on the device.
        manifest: Of its version.
        tolerance: The largest accepted difference of a logit.
        latency: Has the sizes that were warmed up; no others are run.

    Raises:
        GoldenSamplesError: A logit differs by more than the tolerance, or their shapes do.
    """
    largest = max(latency.table_s)
    chunks = [
        golden.images[start : start + largest] for start in range(0, len(golden.images), largest)
    ]
    runs = [_run_padded(backend, images, latency.padded(len(images))) for images in chunks]
    logits, expected = np.concatenate([run.logits for run in runs]), golden.logits
    count, classes = len(golden.images), len(manifest.labels)
    # Checked before the subtraction, which would stretch a row or a column to fit.
    if not logits.shape == expected.shape == (count, classes):
        raise GoldenSamplesError(
            f"{_where(manifest)}: logits of {count} golden samples: expected {[count, classes]} as "
            f"the manifest says, recorded {list(expected.shape)}, got {list(logits.shape)}"
        )
    difference = float(np.abs(logits - expected).max())
    # The negation also catches NaN.
    if not difference <= tolerance:
        # Products of TF32's 10 bits differ by so much, relative to the logits.
        rounded = difference <= _TF32_ERROR * float(np.abs(expected).max())
        hint = "; TF32 is a likely cause" if rounded and "cuda" in backend.device else ""
        raise GoldenSamplesError(
            f"{_where(manifest)}: logits of the golden samples differ by {difference:.2g} on "
            f"{backend.device}, expected at most {tolerance:.2g}{hint}"
        )


def _run_padded(backend: Backend, images: Images, size: int) -> Outputs:
    if size == len(images):
        return backend.run(images)
    padded = np.zeros((size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return backend.run(padded).rows(0, len(images))


def _where(manifest: Manifest) -> str:
    return f"model {manifest.name!r} version {manifest.version}"
