"""ONNX classifiers as other tools write them, built by hand: 3 x 32 x 32 in, ten classes out."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

CLASSES = 10
SIDE_PX = 32
_RANDOM = np.random.default_rng(3)
WEIGHTS = {
    "conv.weight": _RANDOM.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
    "conv.bias": _RANDOM.normal(0, 0.1, 8).astype(np.float32),
    "conv2.weight": _RANDOM.normal(0, 0.3, (16, 8, 3, 3)).astype(np.float32),
    "conv2.bias": _RANDOM.normal(0, 0.1, 16).astype(np.float32),
    "head.weight": _RANDOM.normal(0, 1.0, (CLASSES, 16)).astype(np.float32),
    "head.bias": _RANDOM.normal(0, 0.1, CLASSES).astype(np.float32),
}


def nodes(image: str = "input", scores: str = "output") -> list[NodeProto]:
    """Convolutions, pooling and a linear layer, between the names given."""
    strides = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    return [
        helper.make_node("Conv", [image, "conv.weight", "conv.bias"], ["a"], "conv", **strides),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "conv2.weight", "conv2.bias"], ["c"], "conv2", **strides),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], [scores], "head", transB=1),
    ]


def model(
    body: Sequence[NodeProto] | None = None,
    *,
    image: Sequence[int | str] = ("batch", 3, SIDE_PX, SIDE_PX),
    outputs: dict[str, Sequence[int | str]] | None = None,
    kind: int = TensorProto.FLOAT,
    weights: dict[str, np.ndarray] | None = None,
    domains: dict[str, int] | None = None,
    ir_version: int = 8,
) -> ModelProto:
    """A whole model around nodes, by default the plain classifier."""
    graph = helper.make_graph(
        list(body or nodes()),
        "net",
        [helper.make_tensor_value_info("input", kind, image)],
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, shape in (outputs or {"output": ("batch", CLASSES)}).items()
        ],
        [numpy_helper.from_array(value, name) for name, value in (weights or WEIGHTS).items()],
    )
    made: ModelProto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*each) for each in (domains or {"": 17}).items()],
        ir_version=ir_version,
    )
    onnx.checker.check_model(made)
    return made


def half(values: dict[str, np.ndarray] = WEIGHTS) -> dict[str, np.ndarray]:
    """The weights in float16."""
    return {name: value.astype(np.float16) for name, value in values.items()}
