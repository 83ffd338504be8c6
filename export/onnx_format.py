"""ONNX: one file with a symbolic batch axis, named, described and free of local paths."""

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor

from export.errors import UnsupportedNetError, one_line
from export.servable import INPUT_NAME, Images, Outputs, Run, Servable

BATCH_AXIS = "batch"
MAX_FILE_BYTES = 2**31 - 1
"""What protobuf, and so ONNX, can hold in one file."""
# The graph's nodes and names; its weights are what makes a file large.
_GRAPH_BYTES = 16 * 1024 * 1024


def write(
    servable: Servable,
    example: Tensor,
    path: Path,
    description: Mapping[str, object],
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Exports a servable by torch.export, in one file, and has the graph checked.

    Args:
        servable: In eval mode.
        example: Images to export with `[2, H, W, 3]` uint8: a batch of one could become a constant.
        path: Where the file goes.
        description: Metadata of the graph; values that are no strings are written as JSON.
        max_bytes: What the file may hold.

    Raises:
        UnsupportedNetError: ONNX cannot express the net, not with a free batch axis, or not in one
            file.
    """
    _check_size(path, _weights_bytes(servable), max_bytes)
    try:
        program = torch.onnx.export(
            servable,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT_NAME],
            output_names=list(Outputs._fields),
            dynamic_shapes={INPUT_NAME: {0: BATCH_AXIS}},
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = one_line(_first_cause(error))
        raise UnsupportedNetError(f"ONNX cannot express the net: {reason}") from error
    if program is None:
        raise UnsupportedNetError("ONNX cannot express the net: the exporter returned no graph")
    # The nodes carry stack traces with the paths of whoever exported.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in description.items()
        }
    )
    program.save(path, external_data=False)
    check(path)


def _weights_bytes(servable: Servable) -> int:
    return sum(tensor.nbytes for tensor in chain(servable.parameters(), servable.buffers()))


def _check_size(path: Path, weights_bytes: int, max_bytes: int) -> None:
    """Refuses before the export, which takes minutes at this size, and would split the file."""
    room = max_bytes - _GRAPH_BYTES
    if weights_bytes > room:
        raise UnsupportedNetError(
            f"{path.name}: weights: expected at most {room} bytes, as ONNX can hold in one file, "
            f"got {weights_bytes}; --format torchscript and exported-program have no such bound"
        )


def _first_cause(error: BaseException) -> BaseException:
    """Returns what the exporter tripped over, which it wraps in instructions for bug reports."""
    while error.__cause__:
        error = error.__cause__
    return error


def save(model: onnx.ModelProto, path: Path, description: Mapping[str, str]) -> None:
    """Writes a graph that needs no export, with its metadata, and has it checked.

    Raises:
        UnsupportedNetError: The graph is invalid or works for one batch size only.
    """
    onnx.helper.set_model_props(model, dict(description))
    onnx.save(model, path)
    check(path)


def check(path: Path) -> None:
    """Checks the graph, with shape inference, and that its batch axis is free.

    Raises:
        UnsupportedNetError: The graph is invalid or works for one batch size only.
    """
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedNetError(f"{path.name} is not valid ONNX: {one_line(error)}") from error
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise UnsupportedNetError(f"{path.name}: the batch axis of {value.name!r} is not free")


def load(path: Path) -> Run:
    """Returns a function that runs the file by ONNX Runtime on this process's CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Images) -> Outputs:
        return Outputs(*session.run(list(Outputs._fields), {INPUT_NAME: images}))

    return run
