"""TF32 for CUDA: the float32 file itself, proved by a simulation of the rounding.

On the tensor cores of NVIDIA's GPUs since Ampere, products of float32 may round their factors to
TF32, which has the exponent of float32 and 10 bits of mantissa; sums stay in float32. The
simulation rounds the factors of every convolution and matrix product to the nearest such number.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from convoy.export import onnx_format
from convoy.export.servable import Images, Outputs, Run

# x * s - (x * s - x) keeps the upper 11 of the 24 bits (T. J. Dekker, "A Floating-Point
# Technique for Extending the Available Precision", 1971).
_SPLITTER = 2.0**13 + 1
_SPLITTER_NAME = "tf32.splitter"
_ONNX_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
_aten: Any = torch.ops.aten
_TORCH_PRODUCTS = {
    _aten.convolution.default: (0, 1),
    _aten._convolution.default: (0, 1),
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
"""The factors of each product, by their place among its arguments."""


def load_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file on this process's CPU as CUDA would in TF32."""
    model = onnx.inliner.inline_local_functions(onnx.load(path))
    _round_factors(model.graph)
    splitter = numpy_helper.from_array(np.array(_SPLITTER, np.float32), _SPLITTER_NAME)
    model.graph.initializer.append(splitter)
    return onnx_format.load(model.SerializeToString())


def simulate(run: Run) -> Run:
    """Return a function that runs a torch module on this process's CPU as CUDA would in TF32."""

    def run_rounded(images: Images) -> Outputs:
        # Other implementations of attention are one operator with their products inside.
        with sdpa_kernel(SDPBackend.MATH), _RoundedProducts():  # type: ignore[no-untyped-call]
            return run(images)

    return run_rounded


def _round_factors(graph: onnx.GraphProto) -> None:
    nodes: list[onnx.NodeProto] = []
    rounded: dict[str, str] = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _round_factors(attribute.g)
        if node.op_type in _ONNX_PRODUCTS and not node.domain:
            for place in range(2):
                factor = node.input[place]
                if factor not in rounded:
                    rounded[factor] = _append_rounding(nodes, factor)
                node.input[place] = rounded[factor]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _append_rounding(nodes: list[onnx.NodeProto], name: str) -> str:
    """Append the nodes that round a value; return the name of the result."""
    scaled, rest, result = (f"{name}.tf32.{step}" for step in ("scaled", "rest", "rounded"))
    for operator, inputs, output in (
        ("Mul", [name, _SPLITTER_NAME], scaled),
        ("Sub", [scaled, name], rest),
        ("Sub", [scaled, rest], result),
    ):
        nodes.append(onnx.helper.make_node(operator, inputs, [output]))
    return result


class _RoundedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the factors of every product that torch computes, in TorchScript too."""

    def __torch_dispatch__(  # torch prescribes it
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments, named = list(args), kwargs or {}
        for place in _TORCH_PRODUCTS.get(func, ()):
            arguments[place] = _rounded(arguments[place])
        if func not in _TORCH_PRODUCTS:
            # In inference mode operators such as `linear` arrive before they are taken apart.
            with self:
                found = func.decompose(*args, **named)
            if found is not NotImplemented:
                return found
        return func(*arguments, **named)


def _rounded(factor: Tensor) -> Tensor:
    scaled = factor * _SPLITTER
    return scaled - (scaled - factor)
