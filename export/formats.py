"""The kinds of artefact; kept apart so that the command line starts without loading torch."""

from enum import Enum

from convoy.v1 import model_manifest_pb2 as pb


class ArtefactFormat(Enum):
    """What kind of file runs the model; the values are the names on the command line."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"

    @property
    def file_name(self) -> str:
        """Name of such a file beside the manifest."""
        return f"model.{self.value}"


WIRE_FORMATS = {
    ArtefactFormat.ONNX: pb.ARTEFACT_FORMAT_ONNX,
    ArtefactFormat.TORCHSCRIPT: pb.ARTEFACT_FORMAT_TORCHSCRIPT,
}
"""The manifest's name of each."""
