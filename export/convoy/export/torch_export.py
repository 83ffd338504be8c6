"""torch.export: its archive (.pt2), TorchScript's successor, and AOTInductor's compiled packages.

An AOTInductor package contains native code for processors like this one. Exporting one needs a C++
compiler, and loading one runs its code.
"""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from convoy.export.errors import UnsupportedNetError, one_line
from convoy.export.servable import INPUT_NAME, Run, Servable, run_module

DESCRIPTION_FILE = "config.json"
"""Name, inside the archive, of the JSON that describes the model."""

CPU_CAPABILITY = "cpu_capability"
"""Metadata key of a package: the instruction set that a server's processor must have."""


def write(
    servable: Servable, example: Tensor, path: Path, description: Mapping[str, object]
) -> None:
    """Export a servable with a free batch axis and save it with its description inside.

    Raises:
        UnsupportedNetError: torch.export cannot express the net with a free batch axis.
    """
    program = trace(servable, example)
    # Through memory: on a full disk PyTorch's own writer terminates the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={DESCRIPTION_FILE: json.dumps(description)})
    path.write_bytes(buffer.getbuffer())


def trace(servable: Servable, example: Tensor) -> torch.export.ExportedProgram:
    """Return the graph of a servable with a free batch axis.

    Raises:
        UnsupportedNetError: torch.export cannot express the net with a free batch axis.
    """
    dynamic_shapes = {INPUT_NAME: {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(servable, (example,), dynamic_shapes=dynamic_shapes)
    # The tracer passes on any exception of the net's own code.
    except Exception as error:
        raise UnsupportedNetError(
            f"torch.export cannot express the net: {one_line(error)}"
        ) from error


def load(path: Path) -> Run:
    """Return a function that runs the archive on this process's CPU."""
    with warnings.catch_warnings():
        # torch 2.11 warns about how it reads its own file.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        module = torch.export.load(path).module()
    return run_module(module)


def write_package(
    servable: Servable, example: Tensor, path: Path, description: Mapping[str, str]
) -> None:
    """Compile a servable with a free batch axis, its description as the package's metadata.

    Raises:
        UnsupportedNetError: torch.export cannot express the net, or the compiler fails.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    configs = {"aot_inductor.metadata": {**description, CPU_CAPABILITY: capability}}
    program = trace(servable, example)
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )
    # For example a missing compiler, or an operator without a kernel.
    except Exception as error:
        raise UnsupportedNetError(
            f"AOTInductor cannot compile the net here: {one_line(error)}"
        ) from error


def load_package(path: Path) -> Run:
    """Return a function that runs the package on this process's CPU."""
    module = torch._inductor.aoti_load_package(str(path))
    return run_module(module)
