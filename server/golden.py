"""Golden samples: inputs and answers that a version brings, for it to reproduce where it serves."""

import io
import zipfile
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from server.backends import Backend
from server.errors import GoldenSamplesError, InvalidRequestError, VerificationError
from server.images import decode_image
from server.manifest import Manifest
from server.repository import VerifiedFile
from server.requests import Images

# Releases of Pillow may round a resized pixel up or down.
_ROUNDING_LEVELS = 1
# A picture is a photograph at most.
_MAX_PIXELS = 50_000_000


@dataclass(frozen=True, slots=True)
class GoldenSamples:
    """What GoldenSamples describes in model_manifest.proto; n samples of K classes.

    Attributes:
        images: `[n, H, W, 3]`.
        logits: Of the net that was exported, `[n, K]`.
        files: The pictures that the images were made from.
    """

    images: Images
    logits: NDArray[np.float32]
    files: tuple[bytes, ...]


def read_golden_samples(file: VerifiedFile, manifest: Manifest) -> GoldenSamples:
    """Reads the samples of a version.

    Raises:
        VerificationError: They are damaged, or not of the shape that the manifest states.
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
    """Decodes the pictures as those of requests are, and compares them with the tensors.

    Raises:
        GoldenSamplesError: The manifest's steps, or this server's, are not those of the exporter.
    """
    for index, (file, expected) in enumerate(zip(golden.files, golden.images, strict=True)):
        where = f"{_where(manifest)}: picture {index} of the golden samples"
        try:
            decoded = decode_image(file, manifest.preprocessing, _MAX_PIXELS)[0]
        except InvalidRequestError as error:
            raise GoldenSamplesError(f"{where}: {error}") from error
        difference = int(np.abs(decoded.astype(np.int16) - expected).max())
        if difference > _ROUNDING_LEVELS:
            raise GoldenSamplesError(
                f"{where}: pixels: decoded by the manifest's preprocessing they differ by "
                f"{difference} from its tensor, expected at most {_ROUNDING_LEVELS}"
            )


def check_answers(
    golden: GoldenSamples, backend: Backend, manifest: Manifest, tolerance: float
) -> None:
    """Compares the answers on this device with those of the net that was exported.

    Raises:
        GoldenSamplesError: A logit differs by more than the tolerance, or their shapes do.
    """
    logits, expected = backend.run(golden.images).logits, golden.logits
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
        raise GoldenSamplesError(
            f"{_where(manifest)}: logits of the golden samples differ by {difference:.2g} on "
            f"{backend.device}, expected at most {tolerance:.2g}"
        )


def _where(manifest: Manifest) -> str:
    return f"model {manifest.name!r} version {manifest.version}"
