"""The management API of a real server: register, describe, list, scale, change, unregister, and what it refuses."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from tests.asking import fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, server
from tests.traffic import Answering
from tests.waiting import eventually


@pytest.fixture(scope="module")
def spare(make_archive: MakeArchive) -> tuple[Path, ...]:
    return tuple(make_archive(name) for name in ("echo", "gate", "dies_on_load"))


@pytest.fixture(scope="module")
def empty(spare: tuple[Path, ...]) -> Iterator[Server]:
    """A server that serves nothing yet; each test unregisters what it has registered."""
    with server(spare=spare, stop_grace=0.5) as running:
        yield running


@pytest.fixture
def bare(empty: Server) -> Iterator[Server]:
    yield empty
    empty.unregister_all()


def test_a_model_is_registered_described_used_and_unregistered(bare: Server) -> None:
    assert fetch(bare.url, "POST", "/predictions/echo").status == 404
    reply = bare.manage("POST", "/models?url=echo-1.0.mar&initial_workers=2&batch_size=4&max_batch_delay=10")
    assert (reply.status, reply.json()) == (
        200,
        {"status": 'Model "echo" Version: 1.0 registered with 2 initial workers'},
    )
    described = bare.describe("echo")
    expected = {
        "modelName": "echo", "modelVersion": "1.0", "modelUrl": "echo-1.0.mar", "state": "READY", "minWorkers": 2,
        "maxWorkers": 2, "batchSize": 4, "maxBatchDelay": 10, "loadedAtStartup": False, "defaultVersion": True,
        "versions": ["1.0"], "handler": "echo:Echo",
    }  # fmt: skip
    assert {key: described[key] for key in expected} == expected
    pids = bare.workers("echo")
    assert len(set(pids)) == 2
    assert bare.predict("echo", b"x").json()["pid"] in pids
    assert bare.manage("DELETE", "/models/echo").json() == {"status": 'Model "echo" unregistered'}
    assert bare.predict("echo").status == 404
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not bare.extracted


def test_an_asynchronous_registration_answers_at_once(bare: Server) -> None:
    reply = bare.manage("POST", "/models?url=echo-1.0.mar&synchronous=false&model_name=other")
    assert (reply.status, reply.json()) == (202, {"status": "Processing worker updates..."})
    eventually(lambda: bare.describe("other")["state"] == "READY")
    assert bare.predict("other", b"x").status == 200


def test_parameters_may_come_as_json(bare: Server) -> None:
    body = json.dumps({"url": "echo-1.0.mar", "initial_workers": 0, "model_name": "j"})
    reply = fetch(bare.management, "POST", "/models", body, {"Content-Type": "application/json"})
    assert reply.json()["status"].endswith("Use scale workers API to add workers for the model.")
    refused = bare.predict("j")
    assert (refused.status, refused.message) == (
        503,
        "model j 1.0 has no workers; scale it up on the management port",
    )


def test_scaling_up_and_down(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar")
    (first,) = bare.workers("echo")
    assert bare.manage("PUT", "/models/echo?min_worker=3&synchronous=true").status == 200
    assert len(bare.workers("echo")) == 3
    assert first in bare.workers("echo")
    assert bare.manage("PUT", "/models/echo?min_worker=1").status == 202
    eventually(lambda: len(bare.describe("echo")["workers"]) == 1)
    assert bare.manage("PUT", "/models/echo/1.0?min_worker=0&synchronous=true").status == 200
    assert bare.describe("echo")["workers"] == []
    assert bare.predict("echo").status == 503


def test_scaling_down_answers_what_is_in_hand(bare: Server, make_gate: MakeGate) -> None:
    bare.manage("POST", "/models?url=gate-1.0.mar&initial_workers=1")
    gate, answering = make_gate(), Answering()
    answering.send(bare, "gate", gate.body)
    eventually(gate.begun)
    bare.manage("PUT", "/models/gate?min_worker=0")
    gate.open()
    assert [reply.status for reply in answering.results()] == [200]
    eventually(lambda: bare.describe("gate")["workers"] == [])


def test_unregistering_answers_what_is_in_hand(bare: Server, make_gate: MakeGate) -> None:
    bare.manage("POST", "/models?url=gate-1.0.mar")
    gates, answering = [make_gate() for _ in range(3)], Answering()
    for gate in gates:
        answering.send(bare, "gate", gate.body)
    eventually(lambda: bare.metric("mms_queue_depth", model="gate") == 2)
    leaving = threading.Thread(target=bare.manage, args=("DELETE", "/models/gate"))
    leaving.start()
    eventually(lambda: bare.manage("GET", "/models/gate").status == 404)
    assert bare.predict("gate", gates[0].body).status == 404
    assert leaving.is_alive()
    for gate in gates:
        gate.open()
    leaving.join()
    assert [reply.status for reply in answering.results()] == [200] * 3


def test_batch_settings_change_while_the_model_is_served(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar")
    before = bare.workers("echo")
    reply = bare.manage("PUT", "/models/echo?batch_size=7&max_batch_delay=20&queue_size=9")
    assert reply.json() == {"status": "Settings changed for model: echo 1.0"}
    described = bare.describe("echo")
    assert (described["batchSize"], described["maxBatchDelay"], described["queueSize"]) == (7, 20, 9)
    assert bare.workers("echo") == before


@pytest.mark.parametrize("wrong", ["min_worker=3&max_worker=1", "min_worker=x", "queue_size=0", "synchronous=maybe"])
def test_a_change_is_made_as_a_whole_or_not_at_all(bare: Server, wrong: str) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar&initial_workers=0")
    before = bare.describe("echo")
    assert bare.manage("PUT", f"/models/echo?batch_size=7&{wrong}").status == 400
    assert bare.describe("echo") == before


def test_workers_and_settings_change_in_one_call(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar")
    reply = bare.manage("PUT", "/models/echo?batch_size=7&min_worker=0&max_worker=4&synchronous=true")
    assert reply.json() == {"status": "Workers scaled to 0 for model: echo, version: 1.0"}
    described = bare.describe("echo")
    assert (described["batchSize"], described["minWorkers"], described["maxWorkers"]) == (7, 0, 4)


def test_a_lower_delay_counts_for_those_who_wait_already(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar&batch_size=8&max_batch_delay=30000")
    answering = Answering()
    answering.send(bare, "echo", b"x")
    eventually(lambda: bare.metric("mms_queue_depth", model="echo") == 1)
    bare.manage("PUT", "/models/echo?max_batch_delay=1")
    assert [reply.status for reply in answering.results(5)] == [200]


def test_a_models_log_is_closed_when_its_last_version_is_gone(bare: Server) -> None:
    def is_open() -> bool:
        log = str(bare.run_dir / "logs" / "dies_on_load.log")
        return log in {file.path for file in psutil.Process(bare.pid).open_files()}

    bare.manage("POST", "/models?url=dies_on_load-1.0.mar")
    assert is_open()
    bare.manage("POST", "/models?url=dies_on_load-1.0.mar")
    assert is_open(), "the new version's log"
    bare.manage("DELETE", "/models/dies_on_load")
    assert not is_open()


def test_the_list_is_paged_by_name(bare: Server) -> None:
    for name in ("b", "a", "c"):
        bare.manage("POST", f"/models?url=echo-1.0.mar&initial_workers=0&model_name={name}")
    first = bare.manage("GET", "/models?limit=2").json()
    assert [model["modelName"] for model in first["models"]] == ["a", "b"]
    assert first["models"][0]["modelUrl"] == "echo-1.0.mar"
    second = bare.manage("GET", f"/models?limit=2&next_page_token={first['nextPageToken']}").json()
    assert [model["modelName"] for model in second["models"]] == ["c"]
    assert "nextPageToken" not in second


@pytest.mark.parametrize(
    ("method", "path", "status", "kind", "words"),
    [
        ("POST", "/models", 400, "BadRequestException", "Parameter url is required."),
        ("POST", "/models?url=cat.mar", 404, "ModelNotFoundException", "the model store; it holds"),
        ("POST", "/models?url=../echo.mar", 400, "BadRequestException", "without a path"),
        ("POST", "/models?url=http://a/b.mar", 400, "BadRequestException", "from the model store only"),
        ("POST", "/models?url=echo-1.0.mar&model_name=a/b", 400, "BadRequestException", "no model name"),
        ("POST", "/models?url=echo-1.0.mar&batch_size=0", 400, "ConfigException", "at least 1"),
        ("POST", "/models?url=echo-1.0.mar&batch_size=x", 400, "ConfigException", "batch_size = 'x'"),
        ("POST", "/models?url=echo-1.0.mar&runtime=java", 400, "BadRequestException", "java"),
        ("POST", "/models?url=echo-1.0.mar&batchsize=1", 400, "BadRequestException", "did you mean batch_size?"),
        ("DELETE", "/models/echo?x=1&y=1&x=1", 400, "BadRequestException", "parameter x stands more than once"),
        ("POST", "/models?url=echo-1.0.mar&url=other.mar", 400, "BadRequestException", "url stands more than once"),
        ("POST", "/models?url=echo-1.0.mar&synchronous=maybe", 400, "BadRequestException", "true or false"),
        ("POST", "/models?url=echo-1.0.mar&handler=echo:Nothing", 500, "ModelLoadException", "function Nothing"),
        ("POST", "/models?url=echo-1.0.mar&handler=p%20q", 400, "BadRequestException", "handler = 'p q': module:Name"),
        ("POST", "/models?url=echo-1.0.mar&initial_workers=x", 400, "ConfigException", "initial_workers = 'x'"),
        ("POST", "/models?url=echo-1.0.mar&initial_workers=100000000", 400, "ConfigException", "at most 1024"),
        ("GET", "/models?limit=0", 400, "BadRequestException", "limit = 0: a whole number from 1"),
        ("GET", "/models/cat", 404, "ModelNotFoundException", "cat"),
        ("PUT", "/models/cat?min_worker=1", 404, "ModelNotFoundException", "cat"),
        ("PUT", "/models/cat/1.0/set-default", 404, "ModelNotFoundException", "cat"),
        ("DELETE", "/models/cat", 404, "ModelNotFoundException", "cat"),
        ("GET", "/nowhere", 404, "ResourceNotFoundException", "not found"),
        ("PATCH", "/models", 405, "MethodNotAllowedException", "not allowed"),
    ],
)
def test_what_management_refuses(bare: Server, method: str, path: str, status: int, kind: str, words: str) -> None:
    reply = bare.manage(method, path)
    assert (reply.status, reply.json()["type"]) == (status, kind)
    assert words in reply.message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("min_worker=3&max_worker=1", "max_worker cannot be less"),
        ("min_worker=-1", "min_worker"),
        ("min_worker=100000000", "min_worker = 100000000: a whole number from 0 to 1024 is needed"),
        (f"max_worker={'9' * 5000}", "max_worker"),
        ("x=1", "x"),
    ],
)
def test_what_scaling_refuses(bare: Server, path: str, words: str) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar")
    reply = bare.manage("PUT", f"/models/echo?{path}")
    assert reply.status == 400
    assert words in reply.message
    assert len(bare.workers("echo")) == 1


def test_scaling_without_a_number_is_to_one_as_in_mms(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar&initial_workers=2")
    assert bare.manage("PUT", "/models/echo?max_worker=4&synchronous=true").status == 200
    described = bare.describe("echo")
    assert (described["minWorkers"], described["maxWorkers"], len(described["workers"])) == (2, 4, 2)
    assert bare.manage("PUT", "/models/echo?synchronous=true").status == 200
    assert bare.describe("echo")["minWorkers"] == 1


def test_instances_are_taken_as_json_in_body_and_query(bare: Server) -> None:
    groups = [{"kind": "cpu", "count": 2, "threads": 2}]
    assert bare.manage("POST", "/models", url="echo-1.0.mar", instances=groups).status == 200
    query = quote(json.dumps(groups))
    assert (
        bare.manage("POST", f"/models?url=echo-1.0.mar&model_name=b&initial_workers=1&instances={query}").status == 200
    )
    for name, count in (("echo", 2), ("b", 1)):
        described = bare.describe(name)
        assert described["instances"] == groups
        assert [(worker["kind"], worker["threads"]) for worker in described["workers"]] == [("cpu", 2)] * count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"instances": [{"kind": "gpu", "gpus": [977]}]}, "echo-1.0.mar: gpus: 977 does not exist; this server sees: "),
        ({"gpus": ["GPU-none"]}, "echo-1.0.mar: gpus: GPU-none does not exist; this server sees: "),
        ({"instances": [{"kind": "tpu"}]}, "instances = [{'kind': 'tpu'}]: Invalid enum value 'tpu'"),
        ({"instances": [{"kind": "cpu"}], "device": "cpu"}, "instances say where the workers run, and so does device"),
        ({"instances": "[{"}, "a list is needed"),
    ],
)
def test_groups_that_cannot_be_are_refused(bare: Server, settings: dict[str, Any], words: str) -> None:
    reply = bare.manage("POST", "/models", url="echo-1.0.mar", **settings)
    assert (reply.status, reply.json()["type"]) == (400, "ConfigException")
    assert words in reply.message
    assert bare.manage("GET", "/models/echo").status == 404


def test_bounds_change_while_the_model_is_served(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar&initial_workers=2")
    assert "targetWorkers" not in bare.describe("echo")
    for query, minimum, maximum, running in (
        ("min_worker=1&max_worker=4", 1, 4, 2),
        ("max_worker=1", 1, 1, 1),
        ("min_worker=0&max_worker=4", 0, 4, 0),
        ("max_worker=5", 0, 5, 0),
    ):
        reply = bare.manage("PUT", f"/models/echo?{query}&synchronous=true")
        assert reply.json()["status"] == f"Workers scaled to {running} for model: echo, version: 1.0"
        described = bare.describe("echo")
        assert (described["minWorkers"], described["maxWorkers"], len(described["workers"])) == (
            minimum,
            maximum,
            running,
        )


def test_null_is_as_if_not_there(bare: Server) -> None:
    nothing = dict.fromkeys(("model_name", "handler", "sha256", "runtime", "initial_workers", "batch_size"))
    assert bare.manage("POST", "/models", url="echo-1.0.mar", synchronous=None, **nothing).status == 200
    assert bare.describe("echo")["batchSize"] == 1
    assert bare.manage("PUT", "/models/echo", batch_size=3, min_worker=None).status == 200
    assert bare.describe("echo")["batchSize"] == 3
    assert "unknown parameter nothing" in bare.manage("POST", "/models", url="echo-1.0.mar", nothing=None).message


@pytest.mark.parametrize("name", ["url", "model_name", "handler", "sha256"])
@pytest.mark.parametrize("value", [["echo-1.0.mar"], 1, True, {}])
def test_a_text_that_is_none_is_refused_by_its_name(bare: Server, name: str, value: Any) -> None:
    reply = bare.manage("POST", "/models", **{"url": "echo-1.0.mar", name: value})
    assert (reply.status, reply.message) == (400, f"{name} = {value!r}: a text is needed")


def test_a_body_over_the_limit_is_413(bare: Server) -> None:
    reply = bare.manage("POST", "/models", url="x" * (1 << 20))
    assert (reply.status, reply.json()["type"]) == (413, "RequestEntityTooLargeException")
    assert "1048576 bytes" in reply.message


def test_the_handler_of_the_registration_is_shown(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar&initial_workers=0&handler=other:X")
    assert bare.describe("echo")["handler"] == "other:X"


def test_a_file_name_that_is_not_utf8_stays_out_of_the_way(bare: Server) -> None:
    """It is not listed, and cannot be named; other errors are told as before."""
    store = os.fsencode(bare.folder / "store")
    os.link(store + b"/echo-1.0.mar", store + b"/a\xffb.mar")
    try:
        reply = bare.manage("POST", "/models?url=missing.mar")
        assert (reply.status, "b.mar" in reply.message) == (404, False)
        assert bare.manage("POST", "/models?url=a%FFb.mar").status in (400, 404)
        assert bare.manage("GET", "/models").json() == {"models": []}
    finally:
        os.unlink(store + b"/a\xffb.mar")


def test_a_method_that_is_not_allowed_names_those_that_are(bare: Server) -> None:
    assert bare.manage("PATCH", "/models").headers["allow"] == "GET, POST"
    for path, methods in (("/predictions/echo", "GET, POST, PUT"), ("/ping", "GET, HEAD")):
        bare.manage("POST", "/models?url=echo-1.0.mar&initial_workers=0")
        reply = fetch(bare.url, "DELETE", path)
        assert (reply.status, reply.headers["allow"]) == (405, methods)


@pytest.mark.parametrize("body", ["[1]", "{", "{}x", "[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(bare: Server, body: str) -> None:
    reply = fetch(bare.management, "POST", "/models", body, {"Content-Type": "application/json"})
    assert reply.status == 400
    assert "not a JSON object" in reply.message


def test_a_second_registration_is_a_conflict(bare: Server) -> None:
    bare.manage("POST", "/models?url=echo-1.0.mar")
    reply = bare.manage("POST", "/models?url=echo-1.0.mar")
    assert (reply.status, reply.message) == (409, "Model version 1.0 is already registered for model echo")
    assert bare.predict("echo", b"x").status == 200


@pytest.mark.parametrize("damage", ["cut", "changed", "no-zip"])
def test_a_broken_archive_is_refused_and_nothing_is_left(bare: Server, damage: str) -> None:
    store = bare.folder / "store"
    data = bytearray((store / "echo-1.0.mar").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "changed":
        data[60] ^= 0xFF
    else:
        data[:] = b"nothing like an archive"
    (store / "broken.mar").write_bytes(data)
    try:
        reply = bare.manage("POST", "/models?url=broken.mar&model_name=broken")
        assert (reply.status, reply.json()["type"]) == (400, "InvalidModelException")
        assert reply.message
    finally:
        (store / "broken.mar").unlink()
    assert bare.manage("GET", "/models/broken").status == 404
    assert not bare.extracted
