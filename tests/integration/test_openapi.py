"""The OpenAPI document of the page describes the replies of a real server."""

import ast
import http.client
import json
import re
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import jsonschema
import pytest

ROUTES = Path(__file__).parents[2] / "server" / "convoy" / "server" / "rest"
DOCUMENT = json.loads((ROUTES / "page" / "openapi.json").read_text())
VERBS = {"get", "post"}
INFER = {
    "inputs": [
        {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 32 * 32 * 3}
    ]
}


def resolve(value: dict) -> dict:
    while "$ref" in value:
        target = value["$ref"].removeprefix("#/").split("/")
        value = DOCUMENT
        for key in target:
            value = value[key]
    return value


def schema_of(path: str, verb: str, status: int) -> dict:
    reply = resolve(DOCUMENT["paths"][path][verb]["responses"][str(status)])
    schema = reply["content"]["application/json"]["schema"]
    return {**schema, "components": DOCUMENT["components"]}


@pytest.mark.parametrize(
    ("path", "values", "body", "status"),
    [
        ("/v2", {}, None, 200),
        ("/v2/health/live", {}, None, 200),
        ("/v2/health/ready", {}, None, 200),
        ("/v2/models/{model}", {"model": "digits"}, None, 200),
        ("/v2/models/{model}", {"model": "unknown"}, None, 404),
        ("/v2/models/{model}/versions/{version}", {"model": "digits", "version": "1"}, None, 200),
        ("/v2/models/{model}/ready", {"model": "digits"}, None, 200),
        ("/v2/models/{model}/ready", {"model": "unknown"}, None, 400),
        ("/v2/models/{model}/infer", {"model": "digits"}, INFER, 200),
        ("/v2/models/{model}/infer", {"model": "digits"}, {"inputs": []}, 400),
        ("/v2/models/{model}/infer", {"model": "unknown"}, INFER, 404),
    ],
)
def test_a_reply_has_the_documented_form(server, path, values, body, status):
    verb = "get" if body is None else "post"
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request(verb.upper(), path.format(**values), body and json.dumps(body))
    reply = connection.getresponse()
    content = json.loads(reply.read())
    connection.close()
    assert reply.status == status, content
    jsonschema.validate(content, schema_of(path, verb, status))
    if body is not None and status == 200:
        schema = {**DOCUMENT["components"]["schemas"]["InferRequest"]}
        jsonschema.validate(body, {**schema, "components": DOCUMENT["components"]})


def test_every_path_is_documented():
    tree = ast.parse((ROUTES / "routes.py").read_text())
    routes = next(n for n in ast.walk(tree) if getattr(n, "name", "") == "routes")
    named = next(n for n in ast.walk(routes) if isinstance(n, ast.Assign))
    pairs = zip(named.targets[0].elts, named.value.elts, strict=True)
    known = {name.id: value.value for name, value in pairs}
    calls = [n for n in ast.walk(routes) if isinstance(n, ast.Call)]
    texts = [eval(ast.unparse(a), {}, known) for call in calls for a in call.args if is_text(a)]
    assert set(DOCUMENT["paths"]) == {text for text in texts if text.startswith("/v2")}


def is_text(node: ast.expr) -> bool:
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or isinstance(node, ast.Name | ast.JoinedStr)


def test_the_document_is_consistent():
    operations = [
        (path, verb, operation)
        for path, verbs in DOCUMENT["paths"].items()
        for verb, operation in verbs.items()
    ]
    assert {verb for _, verb, _ in operations} <= VERBS
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(names) == len(set(names))
    for path, _, operation in operations:
        parameters = [resolve(each) for each in operation.get("parameters", [])]
        in_path = {each["name"] for each in parameters if each["in"] == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path))


def test_the_server_sends_the_document_and_a_page_for_it(server):
    with urllib.request.urlopen(f"{server.url}/openapi.json") as reply:
        assert reply.headers["Content-Type"] == "application/json"
        assert json.load(reply) == DOCUMENT
    with urllib.request.urlopen(f"{server.url}/docs") as reply:
        assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
        assert b"docs.js" in reply.read()
