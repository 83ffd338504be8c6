"""TorchScript: the one module of `export` that names torch.jit.

torch.jit is deprecated in favour of torch.export and each of its calls warns, as a
DeprecationWarning or, since torch 2.15, a FutureWarning. It still works in every supported release.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from export.errors import UnsupportedNetError, one_line
from export.servable import Images, Outputs, Run, Servable

DESCRIPTION_FILE = "config.json"
"""Name, inside the archive, of the JSON that says what the model is."""


def write(
    servable: Servable, example: Tensor, path: Path, description: Mapping[str, object], script: bool
) -> None:
    """Compiles a servable, freezes it and saves it with its description inside.

    Args:
        servable: In eval mode.
        example: Images to trace with `[2, H, W, 3]` uint8: a batch of one could become a constant.
        path: Where the archive goes.
        description: What travels in the archive as DESCRIPTION_FILE.
        script: Compile the source code, with its control flow, in place of tracing one run of it.

    Raises:
        UnsupportedNetError: TorchScript cannot express the net.
    """
    with _deprecation_accepted(), torch.no_grad():
        frozen = torch.jit.freeze(_compile(servable, example, script))
        frozen.save(str(path), _extra_files={DESCRIPTION_FILE: json.dumps(description)})


def load(path: Path) -> Run:
    """Returns a function that runs the archive on this process's CPU."""
    with _deprecation_accepted():
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]

    def run(images: Images) -> Outputs:
        with torch.inference_mode():
            logits, probabilities = module(torch.from_numpy(images))
        return Outputs(logits.numpy(), probabilities.numpy())

    return run


def _compile(servable: Servable, example: Tensor, script: bool) -> torch.jit.ScriptModule:
    try:
        compiled: torch.jit.ScriptModule
        if script:
            compiled = torch.jit.script(servable)
            return compiled
        # Whether the trace holds for other inputs is for the proof to find out: it sees more.
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
