"""The exporter rejects what a server would reject: the rules are written twice, and held equal."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from convoy.export import manifest as exporter
from convoy.export.errors import InputError
from convoy.export.onnx_graph import KNOWN_DOMAINS, OUTSIDE_OPERATORS, ReadOptions, read_graph
from convoy.export.pipeline import Published
from convoy.server.backends import onnx_check
from convoy.server.errors import GraphError, ManifestError
from convoy.server.models import manifest as server
from convoy.server.models.repository import MAX_MANIFEST_BYTES, VerifiedFile
from convoy.v1 import model_manifest_pb2 as pb
from tests.export import graphs

Change = Callable[[pb.ModelManifest], None]


def copy(published: Published) -> pb.ModelManifest:
    made = pb.ModelManifest()
    made.CopyFrom(published.manifest)
    return made


def accepted_by_server(manifest: pb.ModelManifest) -> bool:
    folder = Path(manifest.name) / str(manifest.version)
    try:
        server.parse_manifest(folder, exporter.to_json(manifest))
    except ManifestError:
        return False
    return len(exporter.to_json(manifest)) <= MAX_MANIFEST_BYTES


def accepted_by_exporter(manifest: pb.ModelManifest) -> bool:
    try:
        exporter.check(manifest)
    except InputError:
        return False
    return True


def set_in(path: str, value: object) -> Change:
    *parents, field = path.split(".")

    def change(manifest: pb.ModelManifest) -> None:
        message = manifest
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, field, value)

    return change


def enlarge(manifest: pb.ModelManifest) -> None:
    labels = [f"{index:0100d}" for index in range(50_000)]
    del manifest.labels[:]
    manifest.labels.extend(labels)
    for output in manifest.outputs:
        output.shape[1] = len(labels)


def bicubic_without_antialias(manifest: pb.ModelManifest) -> None:
    manifest.preprocessing.interpolation = pb.INTERPOLATION_BICUBIC
    manifest.preprocessing.without_antialias = True


def scaled_without_antialias(manifest: pb.ModelManifest) -> None:
    manifest.preprocessing.decoding = pb.DECODING_SCALED
    manifest.preprocessing.without_antialias = True


@pytest.mark.parametrize(
    "change",
    [
        set_in("preprocessing.decoding", 2),
        scaled_without_antialias,
        set_in("preprocessing.height_px", 0),
        set_in("preprocessing.width_px", 0),
        set_in("preprocessing.resize_shorter_px", 31),
        set_in("preprocessing.interpolation", pb.INTERPOLATION_UNSPECIFIED),
        bicubic_without_antialias,
        set_in("abstain_threshold", 1.5),
        set_in("abstain_threshold", -0.1),
        enlarge,
    ],
)
def test_a_manifest_that_the_server_rejects_is_rejected(
    change: Change, published: Published
) -> None:
    manifest = copy(published)
    assert accepted_by_server(manifest)
    assert accepted_by_exporter(manifest)
    change(manifest)
    assert not accepted_by_server(manifest)
    assert not accepted_by_exporter(manifest)


def test_the_size_limit_is_the_servers() -> None:
    assert exporter.MAX_MANIFEST_BYTES == MAX_MANIFEST_BYTES
    assert exporter.SCHEMA_VERSION == server.SCHEMA_VERSION


def test_operator_domains_are_those_of_the_server() -> None:
    assert KNOWN_DOMAINS == onnx_check._KNOWN_DOMAINS
    assert OUTSIDE_OPERATORS == onnx_check._OUTSIDE_OPERATORS


@pytest.mark.parametrize(
    ("domain", "operator"),
    [("com.example", "Relu"), ("com.microsoft", "EPContext"), ("ai.onnx.training", "Gradient")],
)
def test_a_graph_that_the_server_rejects_is_rejected(
    domain: str, operator: str, tmp_path: Path
) -> None:
    model = graphs.model()
    model.graph.node[1].op_type, model.graph.node[1].domain = operator, domain
    model.opset_import.append(helper.make_opsetid(domain, 1))
    content = model.SerializeToString()
    with pytest.raises(GraphError):
        onnx_check.check_self_contained(VerifiedFile("model.onnx", content))
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError):
        read_graph(tmp_path / "model.onnx", ReadOptions())


def test_a_foreign_operator_inside_a_branch_is_rejected_by_both(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Mine", ["output"], ["inner"], domain="com.example")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, ["batch", 10])],
    )
    body = [
        *graphs.nodes(),
        helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch),
    ]
    weights = {**graphs.WEIGHTS, "yes": np.array(True)}
    model = graphs.model(body, weights=weights, domains={"": 17, "com.example": 1})
    content = model.SerializeToString()
    with pytest.raises(GraphError):
        onnx_check.check_self_contained(VerifiedFile("model.onnx", content))
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match="'Mine' of the domain"):
        read_graph(tmp_path / "model.onnx", ReadOptions())
