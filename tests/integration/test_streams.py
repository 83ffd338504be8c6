"""Streams, batches and what the server tells about its models, against a real server process."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from PIL import Image

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc, model_config_pb2
from convoy.v1 import classifier_pb2, classifier_pb2_grpc
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits, publish_version, seal

SHAPE = (HEIGHT, WIDTH, 3)


@pytest.fixture(scope="module", params=GRPC_FLAGS)
def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    folder = publish_version(models / "colors" / "1")
    seal(folder, abstain_threshold=0.4)
    with running_server(models, "--device", "cpu", *GRPC_FLAGS[request.param]) as server:
        yield server


@pytest.fixture
def channel(process: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(process.address) as channel:
        yield channel


@pytest.fixture
def oip(channel: grpc.Channel) -> inference_pb2_grpc.GRPCInferenceServiceStub:
    return inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def classifier(channel: grpc.Channel) -> classifier_pb2_grpc.ClassifierServiceStub:
    return classifier_pb2_grpc.ClassifierServiceStub(channel)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *SHAPE), np.uint8)


def infer_request(pixels: np.ndarray, id_: str = "") -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="colors",
        id=id_,
        inputs=[{"name": "image", "datatype": "UINT8", "shape": pixels.shape}],
        raw_input_contents=[pixels.tobytes()],
    )


def raw(pixels: np.ndarray) -> classifier_pb2.RawImage:
    return classifier_pb2.RawImage(height=HEIGHT, width=WIDTH, pixels=pixels.tobytes())


def plain(red: int, green: int, blue: int) -> np.ndarray:
    return np.full(SHAPE, (red, green, blue), np.uint8)


def test_every_request_of_a_stream_is_answered_under_its_id(oip):
    pixels = images(200)
    requests = [infer_request(pixels[n : n + 1], str(n)) for n in range(200)]
    replies = {r.infer_response.id: r for r in oip.ModelStreamInfer(iter(requests))}
    assert len(replies) == 200
    expected = mean_color_logits(pixels)
    for id_, reply in replies.items():
        assert reply.error_message == ""
        assert reply.infer_response.parameters["triton_final_response"].bool_param
        logits = np.frombuffer(reply.infer_response.raw_output_contents[0], "<f4")
        np.testing.assert_allclose(logits, expected[int(id_)], atol=1e-5)


def test_a_reply_does_not_wait_for_an_earlier_request(oip):
    """A file takes a thread to decode, pixels do not: those behind it overtake it."""
    slow = pb.ModelInferRequest(model_name="colors", id="slow")
    tensor = slow.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(_large_jpeg())
    requests = [slow, *(infer_request(images(1), f"fast {n}") for n in range(5))]
    order = [reply.infer_response.id for reply in oip.ModelStreamInfer(iter(requests))]
    assert sorted(order) == sorted(request.id for request in requests)
    assert order[-1] == "slow"


def _large_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((6000, 6000)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_request_that_fails_leaves_its_stream_as_it_is(oip):
    bad = infer_request(images(1), "bad")
    bad.inputs[0].datatype = "FP32"
    flagged = infer_request(images(1), "flagged")
    flagged.parameters["triton_enable_empty_final_response"].bool_param = True
    requests = [infer_request(images(1), "one"), bad, flagged]
    replies = {r.infer_response.id: r for r in oip.ModelStreamInfer(iter(requests))}
    assert set(replies) == {"one", "bad", "flagged"}
    assert "datatype: expected UINT8" in replies["bad"].error_message
    assert not replies["bad"].infer_response.outputs
    assert replies["flagged"].infer_response.outputs


def test_a_stream_is_answered_while_it_is_open(oip):
    more = threading.Event()

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield infer_request(images(1), "first")
        more.wait(60)
        yield infer_request(images(1), "second")

    replies = oip.ModelStreamInfer(requests())
    assert next(replies).infer_response.id == "first"
    more.set()
    assert next(replies).infer_response.id == "second"
    assert list(replies) == []


def test_a_caller_that_disconnects_from_a_stream_affects_no_other(oip):
    replies = oip.ModelStreamInfer(infer_request(images(2), str(n)) for n in range(500))
    next(replies)
    replies.cancel()
    assert oip.ModelInfer(infer_request(images(1), "after"), timeout=30).id == "after"


def test_a_model_s_configuration(oip):
    config = oip.ModelConfig(pb.ModelConfigRequest(name="colors")).config
    assert (config.name, config.platform, config.backend) == (
        "colors",
        "onnxruntime_onnx",
        "onnxruntime",
    )
    assert (config.input[0].name, list(config.input[0].dims)) == ("image", list(SHAPE))
    assert config.input[0].data_type == model_config_pb2.TYPE_UINT8
    assert [(o.name, list(o.dims)) for o in config.output] == [
        ("logits", [3]),
        ("probabilities", [3]),
    ]
    assert config.max_batch_size >= 1
    (preferred,) = config.dynamic_batching.preferred_batch_size
    assert 1 <= preferred <= config.max_batch_size
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        oip.ModelConfig(pb.ModelConfigRequest(name="cats"))


def test_statistics_count_images_batches_and_their_times(oip):
    def statistics() -> pb.ModelStatistics:
        (model,) = oip.ModelStatistics(pb.ModelStatisticsRequest(name="colors")).model_stats
        return model

    before = statistics()
    for _ in range(3):
        oip.ModelInfer(infer_request(images(2)))
    after = statistics()
    assert (after.name, after.version) == ("colors", "1")
    assert after.inference_count - before.inference_count == 6
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.inference_stats.success.ns >= after.inference_stats.queue.ns
    assert after.last_inference > 1_700_000_000_000
    sizes = {batch.batch_size: batch.compute_infer for batch in after.batch_stats}
    assert sizes[2].count >= 3
    assert sizes[2].ns > 0
    (all_models,) = oip.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert all_models.name == "colors"


def test_a_batch_fails_only_where_an_image_does(classifier):
    request = classifier_pb2.ClassifyBatchRequest(
        model="colors",
        top_k=3,
        images=[
            {"raw": raw(plain(255, 0, 0))},
            {"encoded": b"no image"},
            {"raw": raw(plain(0, 0, 255))},
            {},
        ],
    )
    reply = classifier.ClassifyBatch(request)
    assert (reply.model, reply.version) == ("colors", 1)
    red, damaged, blue, missing = reply.results
    assert (red.classes[0].label, blue.classes[0].label) == ("red", "blue")
    assert len(red.classes) == 3
    assert damaged.error.code == missing.error.code == 3
    assert "got 8 other bytes" in damaged.error.message
    assert not damaged.classes
    assert reply.batch_size == 2
    assert reply.times.inference_ns > 0


def test_a_batch_of_damaged_images_only(classifier):
    request = classifier_pb2.ClassifyBatchRequest(images=[{"encoded": b"no image"}])
    (result,) = classifier.ClassifyBatch(request).results
    assert result.error.code == 3


@pytest.mark.parametrize("count", [0, 100_000])
def test_a_batch_has_bounds(classifier, count):
    request = classifier_pb2.ClassifyBatchRequest(images=[{}] * count)
    with pytest.raises(grpc.RpcError, match="images: expected 1 to") as caught:
        classifier.ClassifyBatch(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_classes_are_streamed_under_their_ids(classifier):
    colors = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
    requests = [
        classifier_pb2.ClassifyStreamRequest(id=id_, request={"raw": raw(plain(*color))})
        for id_, color in colors.items()
    ]
    requests.append(classifier_pb2.ClassifyStreamRequest(id="bad", request={"encoded": b"x"}))
    replies = {reply.id: reply for reply in classifier.ClassifyStream(iter(requests))}
    assert replies["bad"].error.code == 3
    labels = {id_: replies[id_].response.classes[0].label for id_ in colors}
    assert labels == {"r": "red", "g": "green", "b": "blue"}


def test_it_abstains_below_the_model_s_threshold(classifier):
    sure = classifier.Classify(classifier_pb2.ClassifyRequest(raw=raw(plain(255, 0, 0))))
    unsure = classifier.Classify(classifier_pb2.ClassifyRequest(raw=raw(plain(90, 90, 90))))
    assert (sure.abstain, unsure.abstain) == (False, True)
    assert unsure.classes[0].probability < 0.4 < sure.classes[0].probability
    (model,) = classifier.ListModels(classifier_pb2.ListModelsRequest()).models
    assert (model.abstain_threshold, model.temperature) == (0.4, 1.0)
    assert model.max_request_images > 1


def test_a_deadline_that_cannot_be_met_is_rejected_on_arrival(oip):
    request = infer_request(images(1))
    # A microsecond, in the request's own words: gRPC knows of no deadline.
    request.parameters["timeout"].int64_param = 1
    with pytest.raises(grpc.RpcError) as caught:
        oip.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_extensions_are_those_that_work(oip):
    extensions = set(oip.ServerMetadata(pb.ServerMetadataRequest()).extensions)
    assert extensions == {
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "parameters",
        "schedule_policy",
        "statistics",
    }


def test_a_full_queue_says_when_to_try_again(tmp_path: Path):
    publish_version(tmp_path / "colors" / "1")
    flags = ("--max-queue-delay-ms", "30000", "--max-queue-size", "2", "--max-batch-size", "8")
    with (
        running_server(tmp_path, *flags, "--device", "cpu") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        ended = SimpleQueue()
        calls = [stub.ModelInfer.future(infer_request(images(2)), timeout=60) for _ in range(2)]
        for call in calls:
            call.add_done_callback(ended.put)
        rejected = ended.get(timeout=60)
        for call in calls:
            call.cancel()
    assert rejected.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(rejected.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1
