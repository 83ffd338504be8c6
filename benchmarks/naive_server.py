"""A minimal server: grpc.aio, generated messages, one ONNX Runtime call per request.

    python -m benchmarks.naive_server MODEL.onnx

No batching, no validation, no deadlines, no metrics. benchmarks/server.py compares Convoy with it.
"""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import onnxruntime as ort

from benchmarks.raw_onnx import open_session
from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc


class NaiveServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._threads = ThreadPoolExecutor(2)

    async def ModelMetadata(self, request, context):
        image = self._session.get_inputs()[0]
        shape = [size if isinstance(size, int) else -1 for size in image.shape]
        tensor = pb.ModelMetadataResponse.TensorMetadata(
            name=image.name, datatype="UINT8", shape=shape
        )
        return pb.ModelMetadataResponse(name=request.name, inputs=[tensor])

    async def ModelInfer(self, request, context):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._infer, request)

    def _infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        shape = tuple(request.inputs[0].shape)
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape)
        reply = pb.ModelInferResponse(model_name=request.model_name, model_version="1")
        names = ("logits", "probabilities")
        outputs = self._session.run(list(names), {request.inputs[0].name: images})
        for name, scores in zip(names, outputs, strict=True):
            reply.outputs.add(name=name, datatype="FP32", shape=scores.shape)
            reply.raw_output_contents.append(scores.tobytes())
        return reply


async def main() -> None:
    server = grpc.aio.server()
    servicer = NaiveServicer(open_session(sys.argv[1], threads=1))
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    serving = {"event": "serving", "address": f"127.0.0.1:{port}"}
    print(json.dumps(serving), file=sys.stderr, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
