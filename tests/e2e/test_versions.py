"""Several versions of one model: which one answers, and that a change of version loses no request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.servers import Server, server
from tests.traffic import Traffic


@pytest.fixture(scope="module")
def empty(make_archive: MakeArchive) -> Iterator[Server]:
    one, two = make_archive("echo"), make_archive("echo", version="2.0")
    broken = make_archive("crashes_on_load", model_name="echo", version="3.0")
    with server(spare=(one, two, broken)) as started:
        yield started


@pytest.fixture
def running(empty: Server) -> Iterator[Server]:
    assert empty.manage("POST", "/models?url=echo-1.0.mar").status == 200
    yield empty
    for model in empty.manage("GET", "/models").json()["models"]:
        assert empty.manage("DELETE", f"/models/{model['modelName']}").status == 200


def answerer(running: Server, path: str = "echo") -> int:
    reply = running.predict(path, b"x")
    assert reply.status == 200
    return int(reply.json()["pid"])


def test_the_first_version_is_the_default_until_another_is_chosen(running: Server) -> None:
    (old,) = running.workers("echo")
    assert running.manage("POST", "/models?url=echo-2.0.mar").status == 200
    (new,) = running.workers("echo/2.0")
    assert answerer(running) == answerer(running, "echo/1.0") == old
    assert answerer(running, "echo/2.0") == new
    assert (running.describe("echo")["defaultVersion"], running.describe("echo/2.0")["defaultVersion"]) == (True, False)
    assert running.describe("echo")["versions"] == ["1.0", "2.0"]
    reply = running.manage("PUT", "/models/echo/2.0/set-default")
    assert reply.json() == {"status": 'Default version successfully updated for model "echo" to "2.0"'}
    assert answerer(running) == new
    assert running.describe("echo")["modelVersion"] == "2.0"


def test_a_new_version_takes_over_under_load_without_a_lost_request(running: Server) -> None:
    with Traffic(running) as traffic:
        traffic.flows()
        assert running.manage("POST", "/models?url=echo-2.0.mar").status == 200
        assert running.manage("PUT", "/models/echo/2.0/set-default").status == 200
        traffic.flows()
        assert running.manage("DELETE", "/models/echo/1.0").status == 200
        traffic.flows()
    assert traffic.failures == []
    assert running.predict("echo/1.0").status == 404
    assert [answerer(running)] == running.workers("echo/2.0")


def test_without_the_default_version_the_latest_takes_its_place(running: Server) -> None:
    running.manage("POST", "/models?url=echo-2.0.mar")
    (new,) = running.workers("echo/2.0")
    assert running.manage("DELETE", "/models/echo/1.0").status == 200
    assert answerer(running) == new


def test_a_version_that_does_not_load_leaves_the_others_alone(running: Server) -> None:
    (old,) = running.workers("echo")
    assert running.manage("POST", "/models?url=echo-3.0.mar").status == 500
    assert answerer(running) == old
    assert running.predict("echo/3.0").status == 503
    reply = running.manage("PUT", "/models/echo/3.0/set-default")
    assert (reply.status, reply.message) == (409, "model echo 3.0 is FAILED and cannot become the default")
    assert running.manage("DELETE", "/models/echo/3.0").status == 200


def test_unregistering_the_model_ends_all_its_versions(running: Server) -> None:
    running.manage("POST", "/models?url=echo-2.0.mar")
    assert running.manage("DELETE", "/models/echo").status == 200
    assert {running.predict(f"echo{version}").status for version in ("", "/1.0", "/2.0")} == {404}
    assert fetch(running.url, "GET", "/ping").json() == {"status": "Healthy"}


def test_one_archive_may_be_served_under_two_names(running: Server) -> None:
    assert running.manage("POST", "/models?url=echo-1.0.mar&model_name=twin").status == 200
    assert answerer(running, "twin") != answerer(running)
