"""Export: from a net to a verified version in a model repository.

`cli` reads the command line (`flags`). `source` makes a net by name and loads its weights;
`foreign`, `onnx_graph`, `onnx_import` and `huggingface` read models of other tools, `description`
holds their input and classes, `inspection` identifies a file. `servable` wraps the net, so that the
exported graph maps pixels to logits and probabilities. `torchscript`, `torch_export`, `onnx_format`
and `int8` write that graph as files, the artifacts. `samples` chooses the images of the proof,
`reference` runs the eager net on them, `proof` compares each artifact with its outputs. `pipeline`
runs these steps in order, `manifest` describes the version, `signing` signs it, and `repository`
publishes it atomically. `versions` reads published versions. `publish` does all this for a net in
memory.
"""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convoy.export.publisher import publish as publish

# ONNX Runtime reads it at its import; otherwise it reports to its vendor.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = version("convoy-serving")


def __getattr__(name: str) -> object:
    # The command line must start without torch.
    if name == "publish":
        from convoy.export.publisher import publish

        return publish
    raise AttributeError(name)
