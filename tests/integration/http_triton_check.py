"""Calls a server by tritonclient's HTTP client and prints what it answers, as JSON.

Run as a process of its own: tritonclient registers the protocol's protobuf names a second time.
"""

import json
import sys

import numpy as np
import tritonclient.http as triton

address, model, images_path = sys.argv[1:]
images = np.load(images_path)
answers: dict[str, object] = {}
with triton.InferenceServerClient(address) as client:
    answers["live"] = client.is_server_live()
    answers["ready"] = client.is_server_ready()
    answers["model_ready"] = client.is_model_ready(model)
    answers["unknown_ready"] = client.is_model_ready("unknown")
    answers["platform"] = client.get_model_metadata(model)["platform"]
    answers["extensions"] = client.get_server_metadata()["extensions"]
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput("logits", binary_data=binary)]
        reply = client.infer(model, [tensor], outputs=wanted, request_id="seven")
        answers[f"logits_{binary}"] = reply.as_numpy("logits").tolist()
        answers["id"] = reply.get_response()["id"]
    tensor.set_data_from_numpy(images, binary_data=False)
    answers["all_json"] = client.infer(model, [tensor]).as_numpy("logits").tolist()
    classes = [triton.InferRequestedOutput("probabilities", class_count=2)]
    reply = client.infer(model, [tensor], outputs=classes)
    answers["classes"] = [text.decode() for text in reply.as_numpy("probabilities")[:, 0]]
    try:
        client.infer("unknown", [tensor])
    except triton.InferenceServerException as error:
        answers["error"] = [error.status(), error.message()]
print(json.dumps(answers))
