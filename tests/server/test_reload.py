"""SIGHUP: credentials are read again and the repository is looked into, whatever polling does."""

import os
import signal

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import GRPC_FLAGS, running_server
from tests.server.test_access import eventually, live
from tests.server.test_process import infer_request


def replace_unseen(path, content: str) -> None:
    """Writes other bytes of the same number and leaves the file's times as they were."""
    before = path.stat()
    assert before.st_size == len(content)
    with path.open("r+") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def sign(folder, key: Ed25519PrivateKey) -> None:
    (folder / "manifest.sig").write_bytes(key.sign((folder / "manifest.json").read_bytes()))


def pem(key: Ed25519PrivateKey) -> str:
    encoded = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return encoded.decode()


@pytest.mark.parametrize("transport", ["h2corn", "front ends"])
def test_a_hangup_reloads_tokens_keys_and_the_repository(publish, tmp_path, transport):
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    key, tokens = tmp_path / "key.pem", tmp_path / "tokens"
    key.write_text(pem(old))
    tokens.write_text("first")
    models = publish(spoil=lambda folder: sign(folder, old)).parent.parent
    flags = ["--device", "cpu", "--poll-s", "0", "--token-file", tokens]
    flags += ["--require-signature", key, *GRPC_FLAGS[transport]]
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert live(channel, "Bearer first") == "OK"
        publish(2, spoil=lambda folder: sign(folder, new))
        replace_unseen(tokens, "other")
        assert live(channel, "Bearer other") == "UNAUTHENTICATED"
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("version rejected", version=2, reason="signature")
        server.wait_for("reloaded")
        eventually(lambda: live(channel, "Bearer other"), "OK")
        replace_unseen(key, pem(new))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("version switched", new=2)
        infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        metadata = [("authorization", "Bearer other")]
        # The front ends hear of a switch after the owner has made it.
        eventually(lambda: infer(infer_request(), metadata=metadata).model_version, "2")
        assert server.stop() == 0
