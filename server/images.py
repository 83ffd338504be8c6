"""Encoded images to pixels, by the steps stated for ImagePreprocessing in model_manifest.proto."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from server.errors import InvalidRequestError
from server.manifest import Interpolation, Preprocessing
from server.requests import Images

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_FILTERS = {
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


def decode_image(encoded: bytes, preprocessing: Preprocessing, max_pixels: int) -> Images:
    """Decodes one image file and brings it to the model's size.

    Args:
        encoded: A JPEG, PNG, WebP, BMP or GIF file.
        preprocessing: The steps of the model's manifest.
        max_pixels: Larger pictures are refused before their pixels are allocated.

    Returns:
        `[1, height_px, width_px, 3]` RGB.

    Raises:
        InvalidRequestError: It is no such file, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_size(image.size, max_pixels)
            pixels = np.asarray(_preprocess(image, preprocessing))  # [H, W, 3] uint8
    except InvalidRequestError:
        raise
    except UnidentifiedImageError:
        raise InvalidRequestError(
            f"image: expected a {', '.join(_FORMATS)} file, got {len(encoded)} other bytes"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's own bound; a warning is an error once `refuse_decompression_bombs` was called.
        raise InvalidRequestError(
            f"image: expected at most {max_pixels} pixels, got more"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequestError(f"image: expected an intact file: {error}") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise InvalidRequestError("image: expected an intact file") from error
    return pixels[np.newaxis]


def refuse_decompression_bombs() -> None:
    """Makes Pillow refuse, for this process, the sizes that it would only warn of."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _check_size(size_px: tuple[int, int], max_pixels: int) -> None:
    width, height = size_px
    if width * height > max_pixels:
        raise InvalidRequestError(
            f"image: expected at most {max_pixels} pixels, got {width} x {height}"
        )


def _preprocess(image: Image.Image, steps: Preprocessing) -> Image.Image:
    upright = _to_rgb(ImageOps.exif_transpose(image))
    resized = _resize(upright, steps)
    left = (resized.width - steps.width_px) // 2
    top = (resized.height - steps.height_px) // 2
    return resized.crop((left, top, left + steps.width_px, top + steps.height_px))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip the 16 bits to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, steps: Preprocessing) -> Image.Image:
    shorter = min(image.size)
    if not steps.resize_shorter_px:
        size = (steps.width_px, steps.height_px)
    else:
        scale = steps.resize_shorter_px / shorter
        size = (round(image.width * scale), round(image.height * scale))
    return image if image.size == size else image.resize(size, _FILTERS[steps.interpolation])
