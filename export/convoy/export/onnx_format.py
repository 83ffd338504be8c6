"""ONNX: one file with a symbolic batch axis, named, described and free of local paths."""

import importlib.util
import json
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor

from convoy.export.errors import UnsupportedNetError, one_line
from convoy.export.servable import INPUT_NAME, Images, Outputs, Run, Servable

BATCH_AXIS = "batch"
_LOG_FATAL = 4
MAX_FILE_BYTES = 2**31 - 1
"""Largest size of a protobuf message, and so of an ONNX file."""
# For the graph's nodes and names; the rest of a large file is weights.
_GRAPH_BYTES = 16 * 1024 * 1024


def write(
    servable: Servable,
    example: Tensor,
    path: Path,
    description: Mapping[str, object],
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Export a servable by torch.export, in one file, and check the graph.

    Args:
        servable: In eval mode.
        example: Images to export with `[2, H, W, 3]` uint8: a batch of one could become a constant.
        path: Where the file goes.
        description: Metadata of the graph; values other than strings are written as JSON.
        max_bytes: Largest size of the file.

    Raises:
        UnsupportedNetError: ONNX cannot express the net with a free batch axis in one file.
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
    # The nodes contain stack traces with local paths.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in description.items()
        }
    )
    path.write_bytes(program.model_proto.SerializeToString())
    check(path)


def _weights_bytes(servable: Servable) -> int:
    return sum(tensor.nbytes for tensor in chain(servable.parameters(), servable.buffers()))


def _check_size(path: Path, weights_bytes: int, max_bytes: int) -> None:
    """Raise before the export, which at this size would take minutes and split the file."""
    room = max_bytes - _GRAPH_BYTES
    if weights_bytes > room:
        raise UnsupportedNetError(
            f"{path.name}: weights: expected at most {room} bytes, the limit of one ONNX file, "
            f"got {weights_bytes}; --format torchscript and exported-program have no such limit"
        )


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that the exporter wraps in instructions for bug reports."""
    while error.__cause__:
        error = error.__cause__
    return error


def save(model: onnx.ModelProto, path: Path, description: Mapping[str, str]) -> None:
    """Write an existing graph with its metadata, and check it.

    Raises:
        UnsupportedNetError: The graph is invalid or works for one batch size only.
    """
    onnx.helper.set_model_props(model, dict(description))
    path.write_bytes(model.SerializeToString())
    check(path)


def check(path: Path) -> None:
    """Check the graph, with shape inference, and that its batch axis is free.

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


def openvino_is_installed() -> bool:
    """Return whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def load_in_openvino(path: Path) -> Run:
    """Return a function that runs the file by OpenVINO on this process's CPU, in float32."""
    # Otherwise its import would report the use of the library to its vendor.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    model = openvino.Core().read_model(path)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.compile_model(model, "CPU", settings)

    def run(images: Images) -> Outputs:
        found = compiled([images])
        return Outputs(*(np.array(found[name]) for name in Outputs._fields))

    return run


def load(model: Path | bytes) -> Run:
    """Return a function that runs a file, or its bytes, by ONNX Runtime on this process's CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Failures are raised; a log line would report them twice.
    options.log_severity_level = _LOG_FATAL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(images: Images) -> Outputs:
        return Outputs(*session.run(list(Outputs._fields), {INPUT_NAME: images}))

    return run
