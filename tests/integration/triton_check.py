"""Talks to a server with NVIDIA's tritonclient, which knows nothing of this project.

A program of its own: tritonclient registers the protocol's messages under the same names as our
stubs, and one process can hold only one of them. Prints what it saw as JSON.

    python triton_check.py ADDRESS MODEL SAMPLES.npz
"""

import json
import sys

import numpy as np
import tritonclient.grpc as triton


def main() -> None:
    """Asks for liveness, metadata and inference."""
    address, model, samples = sys.argv[1:]
    images = np.load(samples, allow_pickle=False)["images"]
    with triton.InferenceServerClient(address) as client:
        tensor = triton.InferInput("image", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        wanted = [triton.InferRequestedOutput("logits")]
        reply = client.infer(model, [tensor], request_id="42", outputs=wanted)
        seen = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready(model),
            "unknown_ready": client.is_model_ready("unknown"),
            "server": client.get_server_metadata(as_json=True)["name"],
            "metadata": client.get_model_metadata(model, as_json=True),
            "id": reply.get_response().id,
            "logits": reply.as_numpy("logits").tolist(),
        }
        try:
            client.infer("unknown", [tensor])
        except triton.InferenceServerException as error:
            seen["error"] = str(error.status())
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
