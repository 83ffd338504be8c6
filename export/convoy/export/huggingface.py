"""Image classifiers of Hugging Face's transformers, from a local folder.

The folder is what `save_pretrained` writes: config.json, preprocessor_config.json and safetensors.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convoy.export.description import InputDescription, triple
from convoy.export.errors import InputError, one_line
from convoy.export.source import ModelSource, digest_of_file, from_net
from convoy.training.data.images import Interpolation

_log = logging.getLogger(__name__)

CONFIG = "config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
_WEIGHTS = "model.safetensors"
_INTERPOLATIONS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers, as in the processors' configuration."""
_PIXEL_SCALE = 1 / 255
_CROP_SHARE_BELOW_PX = 384
"""ConvNeXt's processor crops smaller images and resizes larger ones without a crop."""


class LogitsOf(nn.Module):
    """Reduces a transformers model to its logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalized `[N, 3, H, W]` to logits `[N, K]`."""
        logits: Tensor = self.net(pixel_values=pixels).logits
        return logits


def from_folder(folder: Path, flags: InputDescription) -> ModelSource:
    """Read an image classifier without running code of the folder.

    Args:
        folder: Its folder.
        flags: The user's options, which take precedence over the folder.

    Raises:
        InputError: transformers is not installed, the folder has no image classifier, or its
            preprocessing cannot be expressed.
    """
    try:
        from transformers import AutoModelForImageClassification
    except ModuleNotFoundError as error:
        raise InputError(
            "a Hugging Face folder needs transformers: pip install 'convoy-serving[transformers]'"
        ) from error
    described = flags.or_else(describe(folder))
    data = described.complete()
    try:
        net = AutoModelForImageClassification.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    # transformers' exceptions have no common base.
    except Exception as error:
        raise InputError(f"{folder}: {one_line(error)}") from error
    weights = folder / _WEIGHTS
    digest = digest_of_file(weights if weights.is_file() else folder / CONFIG)
    architecture = str(_read_json(folder / CONFIG).get("architectures", ["transformers"])[0])
    return from_net(LogitsOf(net.float()), data, described, digest, architecture)


def describe(folder: Path) -> InputDescription:
    """Return the description in the folder's two JSON files.

    Raises:
        InputError: They are missing, malformed, or describe unsupported preprocessing.
    """
    config = _read_json(folder / CONFIG)
    steps = _read_json(folder / PREPROCESSOR_CONFIG)
    names = config.get("id2label") or {}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    height_px, width_px, resize_shorter_px = _sizes(folder, steps)
    if steps.get("do_rescale", True):
        scale = float(steps.get("rescale_factor", _PIXEL_SCALE))
        if abs(scale - _PIXEL_SCALE) > 1e-9 or steps.get("rescale_offset"):
            raise InputError(
                f"{folder}: rescale_factor: expected 1/255 without offset, got {scale}"
            )
    normalizes = steps.get("do_normalize", True)
    mean = steps.get("image_mean") if normalizes else (0.0, 0.0, 0.0)
    std = steps.get("image_std") if normalizes else (1.0, 1.0, 1.0)
    resample = int(steps.get("resample", 2))
    if resample not in _INTERPOLATIONS:
        raise InputError(
            f"{folder}: resample: expected 2 (bilinear) or 3 (bicubic), got {resample}; "
            "give --interpolation"
        )
    return InputDescription(
        labels=labels or None,
        mean=triple("image_mean", mean) if mean else None,
        std=triple("image_std", std) if std else None,
        image_size_px=(height_px, width_px),
        resize_shorter_px=resize_shorter_px,
        interpolation=_INTERPOLATIONS[resample],
    )


def _sizes(folder: Path, steps: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return height, width and the shorter side before the crop."""
    size = steps.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size}
    size = size or {}
    crop = steps.get("crop_size") if steps.get("do_center_crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    shortest = size.get("shortest_edge")
    if shortest and steps.get("crop_pct"):
        if shortest >= _CROP_SHARE_BELOW_PX:
            return shortest, shortest, 0
        return shortest, shortest, int(shortest / steps["crop_pct"])
    if shortest and crop:
        return crop["height"], crop["width"], shortest
    if "height" in size and "width" in size:
        height_px, width_px = size["height"], size["width"]
        if not crop or (crop["height"], crop["width"]) == (height_px, width_px):
            return height_px, width_px, 0
        _log.warning(
            "%s: it resizes images to %d x %d px before the crop; the version resizes their "
            "shorter side instead, which changes the pixels of images that are not square",
            folder,
            height_px,
            width_px,
        )
        return crop["height"], crop["width"], min(height_px, width_px)
    raise InputError(
        f"{folder}: {PREPROCESSOR_CONFIG}: size: expected height and width, or shortest_edge with "
        f"a center crop, got {dict(size)}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InputError(f"{path}: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content
