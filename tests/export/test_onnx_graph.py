"""Graphs as people have them: each is imported and answers like its original, or is rejected."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from convoy.export import onnx_format, onnx_import
from convoy.export.description import InputDescription
from convoy.export.errors import InputError
from convoy.export.foreign import read_foreign
from convoy.export.formats import ChannelOrder, Layout, OutputKind, Precision
from convoy.export.onnx_import import OnnxNet
from convoy.export.reference import expect
from convoy.export.samples import generate_samples
from convoy.export.servable import Outputs
from convoy.export.source import ModelSource
from tests.export import graphs

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
FLAGS = InputDescription(labels=tuple("0123456789"), mean=MEAN, std=STD)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def read(model: ModelProto, folder: Path, **flags: object) -> ModelSource:
    path = folder / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    return read_foreign(path, InputDescription(**flags).or_else(FLAGS))


def serve(source: ModelSource, folder: Path) -> Outputs:
    """The answers of the published graph, by the file that a server would load."""
    assert isinstance(source.net, OnnxNet)
    path = folder / "model.onnx"
    onnx_format.save(onnx_import.wrap(source, source.net), path, {})
    return onnx_format.load(path)(IMAGES)


def normalized(dtype: type = np.float32) -> np.ndarray:
    return ((IMAGES / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(dtype)


def run_original(model: ModelProto, inputs: np.ndarray, output: str = "output") -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([output], {"input": inputs})[0])


PLAIN = graphs.model()
EXPECTED = run_original(PLAIN, normalized())


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def check(found: Outputs, expected: np.ndarray = EXPECTED, atol: float = 1e-5) -> None:
    assert found.logits.shape == (len(IMAGES), 10)
    assert found.logits.dtype == np.float32
    np.testing.assert_allclose(found.logits, expected, atol=atol)
    np.testing.assert_allclose(found.probabilities, softmax(expected), atol=atol)


def with_initializer_inputs() -> ModelProto:
    model = graphs.model(domains={"": 13}, ir_version=7)
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return model


def with_own_function() -> ModelProto:
    model = graphs.model()
    model.graph.node[-1].output[0] = "last"
    model.graph.node.append(
        helper.make_node("MyId", ["last"], ["output"], "mine", domain="pkg.torch")
    )
    model.opset_import.append(helper.make_opsetid("pkg.torch", 1))
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(
        helper.make_function("pkg.torch", "MyId", ["x"], ["y"], body, [helper.make_opsetid("", 17)])
    )
    return model


def with_unused_domains() -> ModelProto:
    # As ONNX Runtime's optimizer writes them.
    unused = {
        "ai.onnx.ml": 5,
        "ai.onnx.training": 1,
        "com.microsoft.nchwc": 1,
        "org.pytorch.aten": 1,
    }
    return graphs.model(domains={"": 17, **unused})


def with_four_axes() -> ModelProto:
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    body = [
        *graphs.nodes(scores="flat"),
        helper.make_node("Unsqueeze", ["flat", "axes"], ["output"], "unsqueeze"),
    ]
    weights = {**graphs.WEIGHTS, "axes": numpy_helper.to_array(axes)}
    return graphs.model(body, outputs={"output": ("batch", 10, 1, 1)}, weights=weights)


def with_log_softmax() -> ModelProto:
    body = [
        *graphs.nodes(scores="raw"),
        helper.make_node("LogSoftmax", ["raw"], ["output"], axis=1),
    ]
    return graphs.model(body)


def fixed_batch(size: int, baked: bool = False) -> ModelProto:
    body = graphs.nodes()
    weights = dict(graphs.WEIGHTS)
    if baked:
        # As torch's older exporter writes a view of a fixed batch.
        body[5] = helper.make_node("Reshape", ["e", "shape"], ["f"], "view")
        weights["shape"] = np.array([size, 16], np.int64)
    return graphs.model(
        body,
        image=(size, 3, 32, 32),
        outputs={"output": (size, 10)},
        weights=weights,
    )


@pytest.mark.parametrize(
    "build",
    [
        graphs.model,
        with_initializer_inputs,
        with_own_function,
        with_unused_domains,
        with_four_axes,
        lambda: fixed_batch(1),
        lambda: fixed_batch(2),
        lambda: fixed_batch(1, baked=True),
        lambda: fixed_batch(2, baked=True),
    ],
    ids=[
        "plain",
        "initializers among the inputs",
        "own function",
        "unused domains",
        "output N K 1 1",
        "batch of 1",
        "batch of 2",
        "batch of 1 in a Reshape",
        "batch of 2 in a Reshape",
    ],
)
def test_it_is_imported_and_answers_like_the_original(build: object, tmp_path: Path) -> None:
    source = read(build(), tmp_path)  # type: ignore[operator]
    assert source.precision is Precision.FP32
    check(serve(source, tmp_path))
    wrapped = onnx.load(tmp_path / "model.onnx")
    assert [each.domain for each in wrapped.opset_import] == [""], "one operator set, once"
    assert not wrapped.functions
    # The reference runs the original, in its own batches.
    reference = expect(source, generate_samples(source.data.preprocessing)).outputs.logits
    assert np.isfinite(reference).all()


def test_a_free_height_and_width_need_the_size(tmp_path: Path) -> None:
    # As Hugging Face's exporter names the axes.
    model = graphs.model(
        image=("batch_size", "num_channels", "height", "width"),
        outputs={"output": ("batch_size", 10)},
    )
    with pytest.raises(InputError, match=r"height and width are free.*--image-size-px"):
        read(model, tmp_path)
    check(serve(read(model, tmp_path, image_size_px=(32, 32)), tmp_path))


def test_another_size_than_the_graph_takes_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the graph takes 32 x 32, got 64 x 64"):
        read(graphs.model(), tmp_path, image_size_px=(64, 64))


def nhwc(image: Sequence[int | str]) -> ModelProto:
    body = [
        helper.make_node("Transpose", ["input"], ["planes"], "nchw", perm=[0, 3, 1, 2]),
        *graphs.nodes(image="planes"),
    ]
    return graphs.model(body, image=image)


@pytest.mark.parametrize(
    ("image", "flags"),
    [
        (("batch", 32, 32, 3), {}),
        (("batch", 32, 32, 3), {"layout": Layout.NHWC}),
        (("batch", "h", "w", "c"), {"image_size_px": (32, 32)}),
    ],
    ids=["by the shape", "by the flag", "by the first operator"],
)
def test_channels_last_is_found(
    image: Sequence[int | str], flags: dict[str, object], tmp_path: Path
) -> None:
    source = read(nhwc(image), tmp_path, **flags)
    check(serve(source, tmp_path))


def test_channels_in_reverse_order(tmp_path: Path) -> None:
    source = read(graphs.model(), tmp_path, channel_order=ChannelOrder.BGR)
    expected = run_original(PLAIN, np.ascontiguousarray(normalized()[:, ::-1]))
    check(serve(source, tmp_path), expected)
    samples = generate_samples(source.data.preprocessing)
    reference = expect(source, samples).outputs.logits[:5]
    found = onnx_format.load(tmp_path / "model.onnx")(samples.real.images[:5]).logits
    np.testing.assert_allclose(found, reference, atol=1e-4)


def test_float16_inside_is_published_as_float16(tmp_path: Path) -> None:
    body = [
        helper.make_node("Cast", ["input"], ["half"], to=TensorProto.FLOAT16),
        *graphs.nodes(image="half", scores="half_scores"),
        helper.make_node("Cast", ["half_scores"], ["output"], to=TensorProto.FLOAT),
    ]
    model = graphs.model(body, weights=graphs.half())
    source = read(model, tmp_path)
    assert source.precision is Precision.FP16
    check(serve(source, tmp_path), atol=0.05)


def test_float16_at_the_edges_is_cast(tmp_path: Path) -> None:
    model = graphs.model(kind=TensorProto.FLOAT16, weights=graphs.half())
    source = read(model, tmp_path)
    assert source.precision is Precision.FP16
    check(serve(source, tmp_path), atol=0.05)


def test_int8_inside_has_the_gate_of_int8(tmp_path: Path) -> None:
    weights = dict(graphs.WEIGHTS)
    weights |= {"scale": np.array(0.05, np.float32), "zero": np.array(128, np.uint8)}
    body = graphs.nodes(image="dequantized")
    body[:0] = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dequantized"]),
    ]
    assert read(graphs.model(body, weights=weights), tmp_path).precision is Precision.INT8


def test_the_scores_are_chosen_by_name_from_several_outputs(tmp_path: Path) -> None:
    outputs = {"output": ("batch", 10), "features": ("batch", 16), "maps": ("batch", 16, 8, 8)}
    body = graphs.nodes()
    body += [
        helper.make_node("Identity", ["f"], ["features"]),
        helper.make_node("Identity", ["d"], ["maps"]),
    ]
    model = graphs.model(body, outputs=outputs)
    with pytest.raises(InputError, match=r"found 2 of .*'output'.*'features'.*--output-name"):
        read(model, tmp_path)
    with pytest.raises(InputError, match=r"expected one of 'output'.*got 'logits'"):
        read(model, tmp_path, output_name="logits")
    check(serve(read(model, tmp_path, output_name="output"), tmp_path))
    # The maps alone are no candidate.
    del model.graph.output[1]
    check(serve(read(model, tmp_path), tmp_path))


def ending_in(*operators: str) -> ModelProto:
    names = ["raw", *(f"t{index}" for index in range(len(operators) - 1)), "output"]
    body = graphs.nodes(scores="raw")
    for operator, before, after in zip(operators, names, names[1:], strict=False):
        axis = {"axis": 1} if operator == "Softmax" else {}
        body.append(helper.make_node(operator, [before], [after], f"make_{after}", **axis))
    return graphs.model(body)


@pytest.mark.parametrize("operators", [("Softmax",), ("Softmax", "Identity", "Flatten")])
def test_softmax_is_never_applied_twice(operators: tuple[str, ...], tmp_path: Path) -> None:
    model = ending_in(*operators)
    for stated in (None, OutputKind.LOGITS, OutputKind.SIGMOID):
        with pytest.raises(InputError, match=r"ends in a softmax.*--output probabilities"):
            read(model, tmp_path, output=stated)
    source = read(model, tmp_path, output=OutputKind.PROBABILITIES)
    found = serve(source, tmp_path)
    np.testing.assert_allclose(found.probabilities, softmax(EXPECTED), atol=1e-6)
    expected = np.log(np.maximum(softmax(EXPECTED), 1e-4))
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)


def test_a_softmax_made_of_other_operators_is_found_by_its_sums(tmp_path: Path) -> None:
    body = [
        *graphs.nodes(scores="raw"),
        helper.make_node("Exp", ["raw"], ["powers"]),
        helper.make_node("ReduceSum", ["powers", "axis"], ["sum"], keepdims=1),
        helper.make_node("Div", ["powers", "sum"], ["output"]),
    ]
    weights = {**graphs.WEIGHTS, "axis": np.array([1], np.int64)}
    source = read(graphs.model(body, weights=weights), tmp_path)
    samples = generate_samples(source.data.preprocessing)
    with pytest.raises(InputError, match=r"sum to 1 for each image.*--output probabilities"):
        expect(source, samples)


def test_logits_that_are_called_probabilities_are_rejected(tmp_path: Path) -> None:
    source = read(graphs.model(), tmp_path, output=OutputKind.PROBABILITIES)
    with pytest.raises(InputError, match="expected probabilities that sum to 1"):
        expect(source, generate_samples(source.data.preprocessing))


def test_a_sigmoid_is_passed_on(tmp_path: Path) -> None:
    model = ending_in("Sigmoid")
    with pytest.raises(InputError, match=r"ends in a sigmoid.*--output sigmoid"):
        read(model, tmp_path)
    source = read(model, tmp_path, output=OutputKind.SIGMOID)
    found = serve(source, tmp_path)
    expected = 1 / (1 + np.exp(-EXPECTED))
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(found.logits, np.log(np.maximum(expected, 1e-3)), atol=1e-4)


def test_log_softmax_counts_as_logits(tmp_path: Path) -> None:
    found = serve(read(with_log_softmax(), tmp_path), tmp_path)
    np.testing.assert_allclose(found.probabilities, softmax(EXPECTED), atol=1e-6)


def test_a_zip_map_is_taken_off(tmp_path: Path) -> None:
    body = [
        *graphs.nodes(scores="raw"),
        helper.make_node("Softmax", ["raw"], ["probabilities"], axis=1),
        helper.make_node(
            "ZipMap",
            ["probabilities"],
            ["map"],
            "zip",
            domain="ai.onnx.ml",
            classlabels_int64s=list(range(10)),
        ),
        helper.make_node("ArgMax", ["raw"], ["label"], axis=1, keepdims=0),
    ]
    model = graphs.model(
        body, outputs={"probabilities": ("batch", 10)}, domains={"": 17, "ai.onnx.ml": 3}
    )
    del model.graph.output[:]
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    rows = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    model.graph.output.extend(
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_value_info("map", rows),
        ]
    )
    source = read(model, tmp_path, output=OutputKind.PROBABILITIES)
    np.testing.assert_allclose(serve(source, tmp_path).probabilities, softmax(EXPECTED), atol=1e-6)
    # The reference reads the dictionaries of the original.
    expect(source, generate_samples(source.data.preprocessing))


def test_external_data_is_packed_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(graphs.model(), path, save_as_external_data=True, size_threshold=0, location="w.bin")
    assert (tmp_path / "w.bin").stat().st_size > 1000
    source = read_foreign(path, FLAGS)
    check(serve(source, tmp_path))
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"foreign\.onnx: "):
        read_foreign(path, FLAGS)


def test_external_data_elsewhere_is_rejected(tmp_path: Path) -> None:
    model = graphs.model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(InputError, match=r"foreign\.onnx"):
        read(model, tmp_path)


def test_a_reshape_to_a_fixed_batch_is_named(tmp_path: Path) -> None:
    body = graphs.nodes()
    body[5] = helper.make_node("Reshape", ["e", "shape"], ["f"], "the_view")
    weights = {**graphs.WEIGHTS, "shape": np.array([2, -1], np.int64)}
    # The axis is declared free, yet only batches of two run.
    model = graphs.model(body, weights=weights)
    with pytest.raises(InputError, match=r"foreign\.onnx: .*free, but node 'the_view' \(Reshape\)"):
        read(model, tmp_path)


def test_another_node_that_fails_is_named(tmp_path: Path) -> None:
    body = graphs.nodes()
    # As a class token for each image of a fixed batch.
    body.insert(6, helper.make_node("Concat", ["f", "tokens"], ["both"], "with_tokens", axis=1))
    body[7].input[0] = "both"
    weights = {**graphs.WEIGHTS, "tokens": np.zeros((2, 16), np.float32)}
    weights["head.weight"] = np.zeros((10, 32), np.float32)
    model = graphs.model(body, weights=weights, image=(2, 3, 32, 32), outputs={"output": (2, 10)})
    with pytest.raises(InputError, match=r"is fixed to 2 .*node 'with_tokens' \(Concat\) fails"):
        read(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image": ("batch", 1, 32, 32)}, r"node '\w+' \(Conv\) fails"),
        ({"image": ("batch", 4, 32, 32)}, "or 1 of gray, got 4"),
        ({"image": ("batch", 3, 32, 32), "kind": TensorProto.DOUBLE}, "expected float32"),
    ],
)
def test_other_inputs_are_rejected(
    change: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    model = graphs.model()
    kind = change.get("kind", TensorProto.FLOAT)
    del model.graph.input[:]
    model.graph.input.append(
        helper.make_tensor_value_info("input", kind, change["image"])  # type: ignore[arg-type]
    )
    with pytest.raises(InputError, match=complaint):
        read(model, tmp_path)


def test_operators_of_another_domain_are_rejected_by_name(tmp_path: Path) -> None:
    model = graphs.model()
    model.graph.node[1].op_type, model.graph.node[1].domain = "MyRelu", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(InputError, match=r"node 'relu': .*'MyRelu' of the domain 'com\.example'"):
        read(model, tmp_path)


def test_another_number_of_classes_is_rejected_with_a_hint(tmp_path: Path) -> None:
    source = read(graphs.model(), tmp_path, labels=tuple("123456789"))
    with pytest.raises(InputError, match=r"\[\d+, 9\] .*got \[\d+, 10\]; is a background class"):
        expect(source, generate_samples(source.data.preprocessing))


def test_a_text_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(InputError, match=r"text\.onnx: expected an ONNX file"):
        read_foreign(path, FLAGS)


def test_multiply_adds_are_those_of_the_layers(tmp_path: Path) -> None:
    net = read(graphs.model(), tmp_path).net
    assert net.multiply_adds == 16 * 16 * 8 * 27 + 8 * 8 * 16 * 72 + 16 * 10
