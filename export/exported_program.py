"""ExportedProgram (.pt2): torch.export's own archive, TorchScript's successor."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.errors import UnsupportedNetError, one_line
from export.servable import INPUT_NAME, Images, Outputs, Run, Servable

DESCRIPTION_FILE = "config.json"
"""Name, inside the archive, of the JSON that says what the model is."""


def write(
    servable: Servable, example: Tensor, path: Path, description: Mapping[str, object]
) -> None:
    """Exports a servable with a free batch axis and saves it with its description inside.

    Raises:
        UnsupportedNetError: torch.export cannot express the net, or not with a free batch axis.
    """
    program = trace(servable, example)
    torch.export.save(program, path, extra_files={DESCRIPTION_FILE: json.dumps(description)})


def trace(servable: Servable, example: Tensor) -> torch.export.ExportedProgram:
    """Returns the graph of a servable with a free batch axis.

    Raises:
        UnsupportedNetError: torch.export cannot express the net, or not with a free batch axis.
    """
    dynamic_shapes = {INPUT_NAME: {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(servable, (example,), dynamic_shapes=dynamic_shapes)
    # The tracer lets through whatever the net's own code raised.
    except Exception as error:
        raise UnsupportedNetError(
            f"torch.export cannot express the net: {one_line(error)}"
        ) from error


def load(path: Path) -> Run:
    """Returns a function that runs the archive on this process's CPU."""
    with warnings.catch_warnings():
        # torch 2.11 warns about how it reads its own file.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        module = torch.export.load(path).module()

    def run(images: Images) -> Outputs:
        with torch.inference_mode():
            logits, probabilities = module(torch.from_numpy(images))
        return Outputs(logits.numpy(), probabilities.numpy())

    return run
