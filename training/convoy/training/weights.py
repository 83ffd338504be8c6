"""Weights of other programs: find the state_dict in a file and fit its names to a net.

Files are read by `torch.load(weights_only=True)` or safetensors, which run no code. Besides tensors
and plain Python values, a few safe types are allowed (`_SAFE_TYPES`), because training scripts
store them with the weights.
"""

import argparse
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convoy.training.errors import CheckpointError

_log = logging.getLogger(__name__)

_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
# Of DistributedDataParallel and AveragedModel, of torch.compile, and of Lightning's modules.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_AVERAGED_STEPS = "n_averaged"
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")
_BLOCKED = re.compile(r"GLOBAL ([\w.]+)")
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
_LISTED = 3

# numpy.core became numpy._core in NumPy 2; files contain either name.
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "bool")),
]


@dataclass(frozen=True, slots=True)
class WeightsOptions:
    """Where the weights are in a file.

    Attributes:
        key: Path of keys to the state_dict, such as "model.state_dict"; None tries the usual ones.
        prefix: Prefix of all names to remove; None tries the usual ones.
        ema: Use the averaged weights (EMA) of a file that has both.
    """

    key: str | None = None
    prefix: str | None = None
    ema: bool = False


def read_weights(path: Path, options: WeightsOptions | None = None) -> dict[str, Tensor]:
    """Read a state_dict from a .safetensors file, a training checkpoint, or a bare `torch.save`.

    Raises:
        CheckpointError: The file is missing, damaged, or has no state_dict; the message names its
            content and the option to add.
    """
    options = options or WeightsOptions()
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: object = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    else:
        content = load_plain(path)
    return _strip(path, _find(path, content, options), options.prefix)


def load_plain(path: Path) -> object:
    """Read a `torch.save` file onto the CPU; never run code from the file.

    Raises:
        CheckpointError: The file is missing or damaged, or contains more than data.
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except pickle.UnpicklingError as error:
        if blocked := _BLOCKED.search(str(error)):
            raise CheckpointError(
                f"{path}: contains {blocked[1]} objects, and reading them could run code; save the "
                "weights alone: torch.save(net.state_dict(), 'weights.pt')"
            ) from error
        raise CheckpointError(f"{path}: expected a checkpoint or weights of PyTorch") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint or weights of PyTorch") from error
    return content


def fit_names(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Return weights with a net's names, if wrappers or old releases explain the difference.

    Removes the usual prefixes, even if only the net's weights have them, renames DenseNet's keys
    of releases before torchvision 0.3, and adds batch norm's counters, which old files lack.
    """
    own = net.state_dict()
    found = {k: v for k, v in weights.items() if k != _AVERAGED_STEPS or k in own}
    auxiliary = [k for k in found if k.startswith(_AUXILIARY) and k not in own]
    if auxiliary:
        _log.warning("weights: left out %d tensors of auxiliary heads", len(auxiliary))
        found = {k: v for k, v in found.items() if k not in auxiliary}
    for candidate in _candidates(_renamed(found, own)):
        if _covers(candidate, own):
            if len(candidate) < len(found):
                _log.warning(
                    "weights: left out %d tensors outside the net", len(found) - len(candidate)
                )
            found = candidate
            break
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, value)
    ordered = OrderedDict(found)
    # Modules read their format's version from it; a copied dict has lost it.
    ordered._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    return ordered


def load_into(net: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a net.

    Raises:
        CheckpointError: They do not fit; the message names the first names that differ.
    """
    fitted, own = fit_names(weights, net), net.state_dict()
    other = [k for k in own if k in fitted and fitted[k].shape != own[k].shape]
    differences = {
        "missing": [repr(k) for k in own if k not in fitted],
        "unknown": [repr(k) for k in fitted if k not in own],
        "of another shape": [
            f"{k!r} ({list(fitted[k].shape)} in the file, {list(own[k].shape)} in the net)"
            for k in other
        ],
    }
    found = [f"{kind}: {_first(names)}" for kind, names in differences.items() if names]
    if found:
        raise CheckpointError(
            f"{where}: expected the {len(own)} tensors of the net, got {len(weights)}; "
            + "; ".join(found)
        )
    try:
        net.load_state_dict(fitted, strict=True)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from error


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of DistributedDataParallel and torch.compile."""
    weights = dict(state_dict)
    # Twice, because either wrapper may be the outer one.
    for prefix in ("_orig_mod.", "module.") * 2:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _check_archive(path: Path) -> None:
    """Raise for archives that are whole programs, and name the command for them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: is a TorchScript program; use convoy-export import")
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        raise CheckpointError(f"{path}: is a torch.export program; use convoy-export import")


def _find(path: Path, content: object, options: WeightsOptions) -> dict[str, Tensor]:
    if options.key is not None:
        for key in options.key.split("."):
            if not isinstance(content, Mapping) or key not in content:
                raise CheckpointError(
                    f"{path}: state_dict_key {options.key!r}: expected {key!r} in {_kinds(content)}"
                )
            content = content[key]
        if not _is_state_dict(content):
            raise CheckpointError(
                f"{path}: state_dict_key {options.key!r}: expected a state_dict of tensors, found "
                f"{_kinds(content)}"
            )
        return dict(content)  # type: ignore[call-overload, no-any-return]
    if _is_state_dict(content) and not options.ema:
        return dict(content)  # type: ignore[call-overload, no-any-return]
    if isinstance(content, Mapping):
        plain = [key for key in _KEYS if _is_state_dict(content.get(key))]
        averaged = [key for key in _EMA_KEYS if _is_state_dict(content.get(key))]
        if options.ema and not averaged:
            raise CheckpointError(
                f"{path}: ema: expected one of {', '.join(_EMA_KEYS)}, found {_kinds(content)}"
            )
        chosen = (averaged if options.ema else plain or averaged)[:1]
        if chosen:
            others = [key for key in (*plain, *averaged) if key != chosen[0]]
            if others:
                _log.warning(
                    "%s: used %r; the file also has %s",
                    path,
                    chosen[0],
                    ", ".join(map(repr, others)),
                )
            return dict(content[chosen[0]])
    raise CheckpointError(
        f"{path}: expected a state_dict of tensors, found {_kinds(content)}; name it with "
        "--state-dict-key"
    )


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _kinds(content: object) -> str:
    """Describe the content of a file, for a message."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if not content:
        return "an empty dict"
    parts = [f"{key!r} ({type(value).__name__})" for key, value in content.items()]
    return ", ".join(parts[:8]) + (", …" if len(parts) > 8 else "")


def _strip(path: Path, weights: dict[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    if prefix is None:
        return strip_prefixes(weights)
    kept = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not kept:
        raise CheckpointError(
            f"{path}: strip_prefix: expected names that begin with {prefix!r}, found "
            f"{_first([repr(name) for name in weights])}"
        )
    if len(kept) < len(weights):
        dropped = [repr(name) for name in weights if not name.startswith(prefix)]
        _log.warning(
            "%s: left out tensors without the prefix %r: %s", path, prefix, _first(dropped)
        )
    return kept


def _candidates(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield weights with their own names, then without each prefix, then without two."""
    yield weights
    once = [stripped for prefix in _PREFIXES if (stripped := _without(weights, prefix))]
    yield from once
    for each in once:
        for prefix in _PREFIXES:
            if stripped := _without(each, prefix):
                yield stripped


def _without(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _covers(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return all(name in weights or name.endswith("num_batches_tracked") for name in own)


def _renamed(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename DenseNet's norm.1 to norm1 and so on, if the net does not have the old names."""
    return {k if k in own else _OLD_DENSENET.sub(r"\1\2", k): value for k, value in weights.items()}


def _first(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
