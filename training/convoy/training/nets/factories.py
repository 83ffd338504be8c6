"""Nets of other packages: a factory in the user's own code, or a timm model.

A factory is a class or function that returns an `nn.Module`, named FILE.py:NAME or
PACKAGE.MODULE:NAME. Only a name given by the user runs code, never one read from a file.
"""

import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from convoy.training.data import Preprocessing
from convoy.training.errors import NetError

TIMM = "timm:"
_HUB = ("hf-hub:", "hf_hub:")
_CLASSES = ("n_classes", "num_classes")
_SIZES = ("image_size", "img_size")


@dataclass(frozen=True, slots=True)
class InputConfig:
    """The published input of a net."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    preprocessing: Preprocessing


def is_factory(name: str) -> bool:
    """Return whether a name is that of a factory in the user's own code."""
    return ":" in name and not name.startswith(TIMM)


def source_digest(name: str) -> str:
    """Return the SHA-256 of a factory's file.

    Raises:
        NetError: The file or module does not exist.
    """
    return hashlib.sha256(Path(_module(name).__file__ or "").read_bytes()).hexdigest()


def takes(name: str, argument: str) -> bool:
    """Return whether a factory accepts `n_classes` or `image_size`, by either usual name."""
    factory = _factory(name)
    return any(_takes(factory, each) for each in (_CLASSES if argument in _CLASSES else _SIZES))


def create_by_factory(
    name: str, n_classes: int | None = None, image_size: int | None = None, **arguments: Any
) -> nn.Module:
    """Call a factory, with the number of classes and the image size if it accepts them.

    Args:
        name: FILE.py:NAME or PACKAGE.MODULE:NAME.
        n_classes: Passed as `n_classes` or `num_classes`.
        image_size: In pixels, passed as `image_size` or `img_size`.
        **arguments: Passed unchanged.

    Raises:
        NetError: The factory is missing, fails, or does not return an `nn.Module`.
    """
    factory = _factory(name)
    for value, keywords in ((n_classes, _CLASSES), (image_size, _SIZES)):
        keyword = next((each for each in keywords if _takes(factory, each)), None)
        if keyword and value is not None and not set(keywords) & set(arguments):
            arguments[keyword] = value
    try:
        net = factory(**arguments)
    # The user's code may raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NetError(f"model {name}: {type(error).__name__}: {reason}") from error
    if not isinstance(net, nn.Module):
        raise NetError(f"model {name}: expected a torch.nn.Module, got {type(net).__name__}")
    return net


def create_by_timm(
    name: str, n_classes: int | None = None, image_size: int | None = None, **arguments: Any
) -> nn.Module:
    """Create a timm model, by default with random weights.

    Args:
        name: timm:NAME; NAME as timm lists it, with or without the tag of its weights, or
            hf-hub:OWNER/REPOSITORY, whose description is fetched.
        n_classes: Outputs of the head; None keeps the published head.
        image_size: In pixels, for models of a fixed size.
        **arguments: Passed to timm; `pretrained=True` downloads weights from its hub.

    Raises:
        NetError: timm is not installed, does not know the name or an argument, or cannot reach the
            hub.
    """
    timm = _import_timm()
    short = name.removeprefix(TIMM)
    if not short.startswith(_HUB) and not timm.is_model(short):
        raise NetError(f"model {name}: expected one of timm.list_models(), got {short!r}")
    if n_classes is not None:
        arguments["num_classes"] = n_classes
    try:
        if image_size is not None:
            try:
                return _as_module(timm.create_model(short, img_size=image_size, **arguments))
            except TypeError:
                # A convolutional net accepts any size and has no such argument.
                pass
        return _as_module(timm.create_model(short, **arguments))
    # The exceptions of timm and its hub have no common base.
    except Exception as error:
        raise NetError(f"model {name}: {_timm_reason(short, error)}") from error


def timm_input(name: str, image_size: int | None = None) -> InputConfig:
    """Return the published mean, std and preprocessing of a timm model.

    Args:
        name: timm:NAME.
        image_size: In pixels, instead of the published one; the crop keeps its ratio.

    Raises:
        NetError: timm is not installed, does not know the name, or cannot reach the hub.
    """
    timm = _import_timm()
    found = timm.data.resolve_data_config(pretrained_cfg=_published(timm, name))
    height_px, width_px = (image_size, image_size) if image_size else found["input_size"][1:]
    share = found["crop_pct"]
    if found["crop_mode"] != "center":
        raise NetError(f"model {name}: expected a center crop, found {found['crop_mode']!r}")
    # timm rounds down; with a ratio of 1 the shorter side is not cropped.
    resize_px = int(min(height_px, width_px) / share)
    interpolation = found["interpolation"]
    steps = Preprocessing(
        height_px,
        width_px,
        max(resize_px, height_px, width_px),
        "bicubic" if interpolation == "bicubic" else "bilinear",
    )
    return InputConfig(tuple(found["mean"]), tuple(found["std"]), steps)


def _published(timm: Any, name: str) -> dict[str, Any]:
    short = name.removeprefix(TIMM)
    if not short.startswith(_HUB):
        config = timm.get_pretrained_cfg(short)
        if config is None:
            raise NetError(f"model {name}: expected one of timm.list_models()")
        return config.to_dict()  # type: ignore[no-any-return]
    try:
        return timm.models.load_model_config_from_hf(short.partition(":")[2])[0]  # type: ignore[no-any-return]
    except Exception as error:
        raise NetError(f"model {name}: {_timm_reason(short, error)}") from error


def _timm_reason(short: str, error: Exception) -> str:
    """Return in one line why timm or its hub failed; both have no common type of exception."""
    if short.startswith(_HUB) and isinstance(error, OSError):
        return "its hub cannot be reached; download the weights and name them with --weights"
    return " ".join(str(error).split())


def _as_module(net: object) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(net).__name__}")
    return net


def _import_timm() -> Any:
    # Each attempt to reach the hub would log two lines; a failure is raised.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise NetError("model: needs timm: pip install 'convoy-serving[timm]'") from error


def _factory(name: str) -> Callable[..., object]:
    module = _module(name)
    _, _, attribute = name.rpartition(":")
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        )
        raise NetError(
            f"model {name}: expected a function or class defined in the file, which has "
            f"{', '.join(names) or 'none'}"
        )
    return factory  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType:
    """Import a factory's module, once per path."""
    place, _, _ = name.rpartition(":")
    try:
        if not place.endswith(".py"):
            with _importing_from(Path.cwd()):
                return importlib.import_module(place)
        path = Path(place).resolve()
        # Pickles and torch.export look classes up by this name.
        key = f"convoy_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        if key in sys.modules:
            return sys.modules[key]
        spec = importlib.util.spec_from_file_location(key, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise NetError(f"model {name}: no file {place}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            # So that the file can import modules of its folder.
            with _importing_from(path.parent):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    except NetError:
        raise
    # The user's code may raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NetError(f"model {name}: {type(error).__name__}: {reason}") from error
    return module


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    path = os.fspath(folder)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


def _takes(factory: Callable[..., object], keyword: str) -> bool:
    try:
        return keyword in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
