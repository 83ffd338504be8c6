"""TorchScript: the one module of `export` that names torch.jit.

torch.jit is deprecated in favor of torch.export and each of its calls warns, as a
DeprecationWarning or, since torch 2.15, a FutureWarning. It still works in every supported release.
"""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from convoy.export.errors import UnsupportedNetError, one_line
from convoy.export.servable import Run, Servable, run_module

DESCRIPTION_FILE = "config.json"
"""Name, inside the archive, of the JSON that describes the model."""


def write(
    servable: Servable, example: Tensor, path: Path, description: Mapping[str, object], script: bool
) -> None:
    """Compile a servable, freeze it and save it with its description inside.

    Args:
        servable: In eval mode.
        example: Images to trace with `[2, H, W, 3]` uint8: a batch of one could become a constant.
        path: Where the archive goes.
        description: Written into the archive as DESCRIPTION_FILE.
        script: Compile the source code, with its control flow, instead of tracing one run.

    Raises:
        UnsupportedNetError: TorchScript cannot express the net.
    """
    with _deprecation_accepted(), torch.no_grad():
        frozen = torch.jit.freeze(_compile(servable, example, script))
        # Through memory: on a full disk PyTorch's own writer terminates the process.
        buffer = io.BytesIO()
        extra = {DESCRIPTION_FILE: json.dumps(description)}
        torch.jit.save(frozen, buffer, _extra_files=extra)
        path.write_bytes(buffer.getbuffer())


def load(path: Path) -> Run:
    """Return a function that runs the archive on this process's CPU."""
    with _deprecation_accepted():
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return run_module(module)


def _compile(servable: Servable, example: Tensor, script: bool) -> torch.jit.ScriptModule:
    try:
        compiled: torch.jit.ScriptModule
        if script:
            compiled = torch.jit.script(servable)
            return compiled
        # The proof checks the trace on many more inputs than the tracer does.
        compiled = torch.jit.trace(servable, (example,), check_trace=False)  # type: ignore[no-untyped-call]
        return compiled
    except (RuntimeError, torch.jit.frontend.FrontendError) as error:
        raise UnsupportedNetError(
            f"TorchScript cannot express the net: {one_line(error)}"
        ) from error


@contextmanager
def _deprecation_accepted() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")
        warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
        yield
