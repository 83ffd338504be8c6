"""Runtimes by the names that `--backend` takes."""

from enum import Enum

from server.manifest import ArtefactFormat


class Runtime(Enum):
    """What runs an artefact; two of them run the same file."""

    ONNX_RUNTIME = "onnx"
    OPENVINO = "openvino"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported-program"
    AOT_INDUCTOR = "aot-inductor"

    @property
    def format(self) -> ArtefactFormat:
        """The format of the artefacts that it runs."""
        return _FORMATS[self]

    @property
    def extra(self) -> str:
        """The extra of this package that installs it."""
        return _EXTRAS[self]


_FORMATS = {
    Runtime.ONNX_RUNTIME: ArtefactFormat.ONNX,
    Runtime.OPENVINO: ArtefactFormat.ONNX,
    Runtime.TORCHSCRIPT: ArtefactFormat.TORCHSCRIPT,
    Runtime.EXPORTED_PROGRAM: ArtefactFormat.EXPORTED_PROGRAM,
    Runtime.AOT_INDUCTOR: ArtefactFormat.AOT_INDUCTOR,
}
_EXTRAS = {
    Runtime.ONNX_RUNTIME: "server or cpu",
    Runtime.OPENVINO: "openvino",
    Runtime.TORCHSCRIPT: "torch",
    Runtime.EXPORTED_PROGRAM: "torch",
    Runtime.AOT_INDUCTOR: "torch",
}
