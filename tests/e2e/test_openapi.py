"""The OpenAPI documents against the served APIs, in both directions: nothing promised is missing, nothing is hidden."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from mms.api import management
from mms.api.guard import Guard
from mms.api.openapi import INFERENCE
from mms.controlplane import ControlPlane
from mms.model_settings import ModelSettings
from mms.models.readiness import Readiness
from tests.asking import Reply, fetch
from tests.conftest import MakeArchive
from tests.servers import Server, server

VALUES = {
    "url": "echo-1.0.mar", "model_name": "documented", "handler": "echo:Echo", "runtime": "python",
    "initial_workers": "0",
    "synchronous": "true", "batch_size": "2", "max_batch_delay": "5", "min_workers": "0", "max_workers": "1",
    "response_timeout": "9", "startup_timeout": "9", "queue_size": "9", "queue_timeout": "9", "retry": "0",
    "queue_bytes": "1MiB", "queue_order": "fifo", "cache": "%7B%22size%22:%221MiB%22%7D",
    "isolate_errors": "true", "device": "cpu", "gpus": "", "cpu_threads": "1", "threads": "1",
    "preprocess_threads": "0", "preload": "", "limit": "5",
    "next_page_token": "0", "sha256": "", "min_worker": "1", "max_worker": "1", "max_requests": "0", "max_rss": "0",
    "preferred_batch_sizes": "1,2", "request_timeout": "5", "priority_levels": "2", "default_priority": "1",
    "priority_queue_sizes": "5,5", "latency_objective_ms": "50", "default_output": "none", "default_on_miss": "true",
    "instances": "", "scale_up_after": "2", "scale_down_after": "60", "scale_to_zero_after": "0",
    "warmup": "[]", "compile": "false", "cuda_graphs": "", "share_weights": "false",
    "load_on_request": "false", "worker_fs": "open", "worker_network": "open", "worker_memory": "0",
}  # fmt: skip
METHODS = ("get", "put", "post", "delete", "patch", "options")


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    with server(make_archive("echo"), spare=(make_archive("echo", version="2.0"),)) as started:
        yield started


def document(running: Server, api: str) -> Any:
    address = running.url if api == "inference" else running.management
    reply = fetch(address, "GET", "/openapi.json")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    return reply.json()


def operations(document: Any) -> list[tuple[str, str, Any]]:
    return [(method, path, what) for path, methods in document["paths"].items() for method, what in methods.items()]


def call(running: Server, api: str, method: str, path: str, query: str = "", body: bytes | None = None) -> Reply:
    address = running.url if api == "inference" else running.management
    target = path.replace("{model}", "echo").replace("{version}", "1.0")
    return fetch(address, method.upper(), f"{target}?{query}" if query else target, body)


@pytest.mark.parametrize("api", ["inference", "management"])
def test_the_document_is_sound(running: Server, api: str) -> None:
    found = document(running, api)
    assert found["openapi"].startswith("3.0.")
    names = [what["operationId"] for _, _, what in operations(found)]
    assert len(set(names)) == len(names)
    for _, path, what in operations(found):
        in_path = {parameter["name"] for parameter in what["parameters"] if parameter["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        assert what["summary"]
        for response in what["responses"].values():
            assert response["description"]
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(found)):
        part = found
        for word in reference.split("/"):
            part = part[word]


def test_every_documented_inference_operation_is_served(running: Server) -> None:
    for method, path, what in operations(document(running, "inference")):
        query = "model_name=echo" if path == "/invocations" else ""
        reply = call(running, "inference", method, path, query, b"x" if "requestBody" in what else None)
        assert reply.status == 200, (method, path)
        assert "200" in what["responses"]


def test_every_documented_management_operation_is_served(running: Server) -> None:
    changing = []
    for method, path, what in operations(document(running, "management")):
        if method in ("get", "put"):
            reply = call(running, "management", method, path)
            assert reply.status < 300, (method, path, reply)
            assert str(reply.status) in what["responses"]
        else:
            changing.append((method, path))
    retries = ["/models/{model}/retry", "/models/{model}/{version}/retry"]
    for path in retries:
        assert call(running, "management", "post", path).status == 200
    assert changing == [
        ("post", "/models"),
        ("delete", "/models/{model}"),
        ("delete", "/models/{model}/{version}"),
        *(("post", path) for path in retries),
        ("delete", "/models/{model}/{version}/cache"),
    ]
    query = "url=echo-2.0.mar&model_name=kept&initial_workers=0&cache=%7B%7D"
    assert running.manage("POST", f"/models?{query}").status == 200
    assert running.manage("DELETE", "/models/kept/2.0/cache").status == 200
    assert running.manage("DELETE", "/models/kept").status == 200
    for path in ("/models/two", "/models/two/2.0"):
        query = "url=echo-2.0.mar&model_name=two&initial_workers=0"
        assert running.manage("POST", f"/models?{query}").status == 200
        assert running.manage("DELETE", path).status == 200
        assert is_no_model(running.manage("GET", path))


def is_no_model(reply: Reply) -> bool:
    return reply.status == 404 and reply.json()["type"] == "ModelNotFoundException"


def test_every_documented_parameter_of_a_registration_is_taken(running: Server) -> None:
    what = document(running, "management")["paths"]["/models"]["post"]
    names = [parameter["name"] for parameter in what["parameters"]]
    assert names == list(what["requestBody"]["content"]["application/json"]["schema"]["properties"])
    query = "&".join(f"{name}={VALUES[name]}" for name in names)
    assert running.manage("POST", f"/models?{query}").status == 200
    try:
        described = running.describe("documented")
        assert (described["batchSize"], described["queueSize"], described["responseTimeout"]) == (2, 9, 9)
    finally:
        assert running.manage("DELETE", "/models/documented").status == 200


@pytest.mark.parametrize("path", ["/models/{model}", "/models/{model}/{version}"])
def test_every_documented_parameter_of_a_change_is_taken(running: Server, path: str) -> None:
    what = document(running, "management")["paths"][path]["put"]
    for parameter in what["parameters"]:
        if parameter["in"] == "query":
            reply = call(running, "management", "put", path, f"{parameter['name']}={VALUES[parameter['name']]}")
            assert reply.status < 300, parameter


def test_every_setting_of_a_model_can_be_given_at_registration(running: Server) -> None:
    what = document(running, "management")["paths"]["/models"]["post"]
    assert {field.name for field in fields(ModelSettings)} <= {parameter["name"] for parameter in what["parameters"]}


def test_the_bounds_of_settings_are_documented(running: Server) -> None:
    what = document(running, "management")["paths"]["/models"]["post"]
    query = {parameter["name"]: parameter["schema"] for parameter in what["parameters"]}
    body = what["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert query["device"] == {"type": "string", "enum": ["auto", "cpu", "gpu"]}
    assert query["batch_size"] == {"type": "integer", "minimum": 1, "maximum": 65536}
    assert (query["gpus"], body["gpus"]["type"], body["gpus"]["items"]) == (
        {"type": "string"},
        "array",
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]},
    )


def test_lists_are_taken_in_a_body(running: Server) -> None:
    body = {"url": "echo-1.0.mar", "model_name": "lists", "initial_workers": 0, "gpus": [], "preload": ["json"]}
    headers = {"Content-Type": "application/json"}
    assert fetch(running.management, "POST", "/models", json.dumps(body), headers).status == 200
    assert running.manage("DELETE", "/models/lists").status == 200


def test_every_served_management_route_is_documented(running: Server) -> None:
    found = {(method, path) for method, path, _ in operations(document(running, "management"))}
    app = management.application(object.__new__(ControlPlane), object.__new__(Readiness), Guard("unix:/m", (), None))
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method not in ("HEAD", "*")
    }
    assert served == found


DOCUMENTED = {(operation.method, operation.path) for operation in INFERENCE}
PATHS = sorted({path for _, path in DOCUMENTED})


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for path in PATHS for method in METHODS if (method, path) not in DOCUMENTED],
)
def test_what_inference_does_not_document_it_does_not_do(running: Server, method: str, path: str) -> None:
    query = "model_name=echo" if path == "/invocations" else ""
    assert call(running, "inference", method, path, query).status == 405


def test_errors_have_documented_statuses_and_the_documented_shape(running: Server) -> None:
    wanted = document(running, "management")["components"]["schemas"]["Error"]["required"]
    seen = [
        ("inference", "post", "/predictions/{model}", running.predict("cat")),
        ("inference", "post", "/predictions/{model}/{version}", running.predict("echo/7")),
        ("inference", "post", "/invocations", fetch(running.url, "POST", "/invocations?model_name=cat", b"")),
        ("management", "post", "/models", running.manage("POST", "/models")),
        ("management", "post", "/models", running.manage("POST", "/models?url=cat.mar")),
        ("management", "post", "/models", running.manage("POST", "/models?url=echo-1.0.mar")),
        ("management", "get", "/models", running.manage("GET", "/models?limit=x")),
        ("management", "get", "/models/{model}", running.manage("GET", "/models/cat")),
        ("management", "put", "/models/{model}", running.manage("PUT", "/models/cat")),
        ("management", "put", "/models/{model}", running.manage("PUT", "/models/echo?x=1")),
        ("management", "get", "/models/{model}", running.manage("GET", "/models/echo?x=1")),
        ("management", "delete", "/models/{model}", running.manage("DELETE", "/models/cat")),
        ("management", "delete", "/models/{model}", running.manage("DELETE", "/models/cat?x=1")),
    ]
    for api, method, path, reply in seen:
        assert set(wanted) <= set(reply.json()), path
        assert str(reply.status) in document(running, api)["paths"][path][method]["responses"], (method, path, reply)
