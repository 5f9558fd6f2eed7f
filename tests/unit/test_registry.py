"""Names, versions and the default one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mms.archive import ModelArchive
from mms.errors import (
    ConflictError,
    ModelNotFoundError,
    ModelVersionNotFoundError,
    QueueFullError,
    ServiceUnavailableError,
)
from mms.model_settings import ModelSettings
from mms.models.registry import ModelRegistry
from mms.models.served import VersionState
from mms.models.version import ModelVersion
from mms.wire import RequestFacts
from mms.workers.job import Job
from tests.unit.jobs import Caller


@pytest.fixture
def archive(tmp_path: Path) -> ModelArchive:
    (tmp_path / "MAR-INF").mkdir()
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(
        '{"runtime": "python", "model": {"modelName": "cat", "handler": "service:handle"}}'
    )
    (tmp_path / "service.py").touch()
    return ModelArchive.open(tmp_path)


def make(archive: ModelArchive, name: str = "cat", version: str = "1.0") -> ModelVersion:
    return ModelVersion(name, version, archive, ModelSettings(queue_size=1))


def test_the_first_version_is_the_default_until_another_is_chosen(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    first, second = make(archive), make(archive, version="2.0")
    registry.add(first)
    registry.add(second)
    assert registry.version("cat") is first and registry.version("cat", "2.0") is second
    registry.set_default("cat", "2.0")
    assert registry.version("cat") is second
    assert registry.versions() == [first, second]


def test_names_and_versions_that_are_not_there(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    registry.add(make(archive))
    with pytest.raises(ModelNotFoundError, match="Model not found: dog"):
        registry.version("dog")
    with pytest.raises(ModelVersionNotFoundError, match=r"version: 3\.0 does not exist for model: cat"):
        registry.version("cat", "3.0")
    with pytest.raises(ModelVersionNotFoundError):
        registry.set_default("cat", "3.0")
    with pytest.raises(ModelNotFoundError):
        registry.set_default("dog", "1.0")


def test_an_announced_name_is_loading(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    registry.announced["cat", "1.0"] = ""
    with pytest.raises(ServiceUnavailableError, match="still loading"):
        registry.version("cat")
    version = make(archive)
    registry.add(version)
    registry.remove(version)
    with pytest.raises(ModelNotFoundError):
        registry.version("cat")


def test_a_version_is_registered_once(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    registry.add(make(archive))
    with pytest.raises(ConflictError, match=r"version 1\.0 is already registered for model cat"):
        registry.add(make(archive))


def test_when_the_default_goes_the_newest_takes_its_place(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    versions = [make(archive, version=str(number)) for number in range(3)]
    for version in versions:
        registry.add(version)
    registry.remove(versions[0])
    assert registry.version("cat") is versions[2]
    registry.remove(versions[1])
    registry.remove(versions[2])
    assert list(registry) == []


def test_removing_a_version_that_was_replaced_changes_nothing(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    old, new = make(archive), make(archive)
    registry.add(old)
    registry.remove(old)
    registry.add(new)
    generation = registry.generation
    registry.remove(old)
    assert registry.version("cat") is new and registry.generation == generation


def test_every_change_of_meaning_is_a_new_generation(archive: ModelArchive) -> None:
    registry = ModelRegistry()
    seen = [registry.generation]
    first, second = make(archive), make(archive, version="2.0")
    registry.add(first)
    seen.append(registry.generation)
    registry.add(second)
    seen.append(registry.generation)
    registry.set_default("cat", "2.0")
    seen.append(registry.generation)
    registry.remove(second)
    seen.append(registry.generation)
    assert len(set(seen)) == len(seen)


# ModelVersion without its workers


def make_job(number: int) -> Job:
    return Job(number, RequestFacts("", "", b"", False, []), b"", [], 0, Caller(), 0.0)


def test_a_version_without_workers_refuses_and_counts(archive: ModelArchive) -> None:
    version = make(archive)
    assert version.state is VersionState.LOADING and version.label == "cat 1.0"
    with pytest.raises(ServiceUnavailableError, match=r"model cat 1\.0 is still loading"):
        version.submit(make_job(1))
    assert version.metrics.requests == {503: 1} and version.metrics.errors == {"ModelLoadingException": 1}


def test_live_settings_reach_the_queue(archive: ModelArchive) -> None:
    version = make(archive)
    version.apply(dataclasses.replace(version.settings, batch_size=4, max_batch_delay=0.1, queue_size=2))
    assert (version.queue.batch_size, version.queue.max_batch_delay, version.queue.capacity) == (4, 0.1, 2)
    jobs = [make_job(number) for number in range(3)]
    version.queue.submit(jobs[0])
    version.queue.submit(jobs[1])
    with pytest.raises(QueueFullError):
        version.queue.submit(jobs[2])


def test_a_version_describes_itself_as_mms_does(archive: ModelArchive) -> None:
    described = make(archive).describe()
    assert described["modelName"] == "cat" and described["modelVersion"] == "1.0" and described["state"] == "LOADING"
    assert described["handler"] == "service:handle" and described["workers"] == []
    assert described["jobQueueStatus"] == {"remainingCapacity": 1, "pendingRequests": 0}
    assert "failure" not in described
