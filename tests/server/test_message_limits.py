"""The largest request follows the models in service."""

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import CLASSES, encode_png, seal

SIDE = 256
MIB = 1024 * 1024


def large_images(folder) -> None:
    """Makes a version of images of 256 x 256 pixels out of the hand-made one."""
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    image = ["batch", SIDE, SIDE, 3]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES])
        for name in ("logits", "probabilities")
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, image)],
        outputs,
        [axes],
    )
    opsets = [helper.make_opsetid("", 20)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    images = np.zeros((8, SIDE, SIDE, 3), np.uint8)
    logits = np.zeros((8, CLASSES), np.float32)
    files = [encode_png(Image.fromarray(each)) for each in images]
    np.savez(
        folder / "samples.npz",
        images=images,
        logits=logits,
        encoded=np.frombuffer(b"".join(files), np.uint8),
        encoded_offsets=np.cumsum([0, *map(len, files)]),
    )
    seal(
        folder,
        input={"name": "image", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]},
        preprocessing={
            "height_px": SIDE,
            "width_px": SIDE,
            "interpolation": "INTERPOLATION_BILINEAR",
        },
    )


@pytest.mark.parametrize("transport", ["h2corn", "front ends"])
def test_a_request_larger_than_the_limit_at_start_is_taken_once_a_larger_model_serves(
    publish, transport
):
    models = publish().parent.parent
    flags = ["--device", "cpu", "--poll-s", "0.05", "--max-message-mib", "0.5"]
    flags += ["--max-request-images", "16", *GRPC_FLAGS[transport]]
    images = np.zeros((16, SIDE, SIDE, 3), np.uint8)
    tensor = {"name": "image", "datatype": "UINT8", "shape": images.shape}
    request = pb.ModelInferRequest(
        model_name="large", inputs=[tensor], raw_input_contents=[images.tobytes()]
    )
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=f"expected at most {MIB // 2} bytes"):
            stub.ModelInfer(request, timeout=60)
        publish(1, name="large", spoil=large_images)
        ready = pb.ModelReadyRequest(name="large")
        while not stub.ModelReady(ready, timeout=60).ready:
            pass
        assert stub.ModelInfer(request, timeout=60).outputs[0].shape == [16, CLASSES]
