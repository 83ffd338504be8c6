"""AOTInductor: a package of native code, compiled for processors like this one.

It needs a C++ compiler where it is exported, and whoever loads it runs what it holds.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.errors import UnsupportedNetError, one_line
from export.exported_program import trace
from export.servable import Images, Outputs, Run, Servable

CPU_CAPABILITY = "cpu_capability"
"""Key of the package's metadata: the instruction set that a server's processor must have."""


def write(servable: Servable, example: Tensor, path: Path, description: Mapping[str, str]) -> None:
    """Compiles a servable with a free batch axis, its description as the package's metadata.

    Raises:
        UnsupportedNetError: torch.export cannot express the net, or it cannot be compiled here.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    configs = {"aot_inductor.metadata": {**description, CPU_CAPABILITY: capability}}
    program = trace(servable, example)
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )
    # From a missing compiler to an operator without a kernel.
    except Exception as error:
        raise UnsupportedNetError(
            f"AOTInductor cannot compile the net here: {one_line(error)}"
        ) from error


def load(path: Path) -> Run:
    """Returns a function that runs the package on this process's CPU."""
    module = torch._inductor.aoti_load_package(str(path))

    def run(images: Images) -> Outputs:
        with torch.inference_mode():
            logits, probabilities = module(torch.from_numpy(images))
        return Outputs(logits.numpy(), probabilities.numpy())

    return run
