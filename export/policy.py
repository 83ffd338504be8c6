"""Which version of a model is served: promote and rollback by a file swapped atomically."""

import os
import tempfile
from pathlib import Path

from google.protobuf import json_format

from convoy.v1 import model_manifest_pb2 as pb
from export.errors import InputError, PublishError, one_line
from export.publishing import ModelFolder

POLICY_NAME = "policy.json"
SCHEMA_VERSION = 1


def read_policy(model: ModelFolder) -> pb.ServingPolicy | None:
    """Returns a model's policy, or None where the newest version is served.

    Raises:
        InputError: The file is malformed.
    """
    try:
        text = (model.path / POLICY_NAME).read_text(encoding="utf-8")
        return json_format.Parse(text, pb.ServingPolicy())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InputError(f"model {model.name!r}: {POLICY_NAME}: {one_line(error)}") from error


def promote(model: ModelFolder, version: int) -> pb.ServingPolicy:
    """Has a version served, whatever is published later.

    Raises:
        InputError: There is no such version.
        PublishError: The policy cannot be written.
    """
    if version not in model.versions():
        found = ", ".join(map(str, model.versions())) or "none"
        raise InputError(
            f"model {model.name!r}: expected one of its versions ({found}), got {version}"
        )
    with model.locked():
        before = read_policy(model)
        previous = [*before.previous, before.version] if before else []
        return _write(model, version, previous)


def rollback(model: ModelFolder) -> pb.ServingPolicy:
    """Takes the last promotion back.

    Raises:
        InputError: Nothing was promoted before the present version.
        PublishError: The policy cannot be written.
    """
    if not model.path.is_dir():
        raise InputError(f"model {model.name!r}: no such model in {model.repository}")
    with model.locked():
        policy = read_policy(model)
        if policy is None or not policy.previous:
            raise InputError(f"model {model.name!r}: expected an earlier promotion, found none")
        return _write(model, policy.previous[-1], policy.previous[:-1])


def _write(model: ModelFolder, version: int, previous: list[int]) -> pb.ServingPolicy:
    policy = pb.ServingPolicy(schema_version=SCHEMA_VERSION, version=version, previous=previous)
    text = json_format.MessageToJson(policy, preserving_proto_field_name=True)
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=model.path, prefix=f".{POLICY_NAME}.", delete=False, encoding="utf-8"
        ) as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(model.path / POLICY_NAME)
    except OSError as error:
        raise PublishError(f"model {model.name!r}: {POLICY_NAME}: {error.strerror}") from error
    return policy
