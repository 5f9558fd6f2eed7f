"""What is registered: ModelRegistry → Model → ModelVersion, with an explicit default version."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mms.errors import (
    ConflictError,
    LoadingError,
    ModelNotFoundError,
    ModelVersionNotFoundError,
    ServiceUnavailableError,
)
from mms.models.version import ModelVersion


class Model:
    """The versions of one name; the first becomes the default and stays it until another is chosen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[str, ModelVersion] = {}
        self.default = ""

    def version(self, version: str = "") -> ModelVersion:
        """That version, or the default one. Raises ModelVersionNotFoundError."""
        try:
            return self.versions[version or self.default]
        except KeyError:
            raise ModelVersionNotFoundError(f"Model version: {version} does not exist for model: {self.name}") from None


class ModelRegistry:
    """All models. `generation` changes whenever a name or a default may mean something else.

    `forget` is called when a version was taken out: whoever keeps notes about versions lets go of them.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.forget: Callable[[], None] = lambda: None
        # (name, version) of what is about to be registered, or why it could not be
        self.announced: dict[tuple[str, str], str] = {}
        self._models: dict[str, Model] = {}

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    def versions(self) -> list[ModelVersion]:
        return [version for model in self._models.values() for version in model.versions.values()]

    def model(self, name: str) -> Model:
        """Raises ModelNotFoundError, or LoadingError while the name is only announced."""
        try:
            return self._models[name]
        except KeyError:
            failures = [failure for (announced, _), failure in self.announced.items() if announced == name]
            if failures:
                raise _unavailable(name, all(failures)) from None
            raise ModelNotFoundError(f"Model not found: {name}") from None

    def version(self, name: str, version: str = "") -> ModelVersion:
        """As `model`; raises ModelVersionNotFoundError, too."""
        try:
            return self.model(name).version(version)
        except ModelVersionNotFoundError:
            if (name, version) in self.announced:
                raise _unavailable(f"{name} {version}", bool(self.announced[name, version])) from None
            raise

    def add(self, version: ModelVersion) -> None:
        """Raises ConflictError when name and version are taken."""
        model = self._models.setdefault(version.name, Model(version.name))
        if version.version in model.versions:
            raise ConflictError(f"Model version {version.version} is already registered for model {version.name}")
        model.versions[version.version] = version
        self.announced.pop((version.name, version.version), None)
        if not model.default:
            model.default = version.version
        self.generation += 1

    def set_default(self, name: str, version: str) -> None:
        model = self.model(name)
        model.version(version)
        model.default = version
        self.generation += 1

    def sort(self, name: str, order: list[str]) -> None:
        """Versions in this order come before the model's others, as if they had been registered so."""
        model = self._models.get(name)
        if model is not None:
            known = [number for number in order if number in model.versions]
            model.versions = {number: model.versions[number] for number in dict.fromkeys([*known, *model.versions])}

    def remove(self, version: ModelVersion) -> None:
        """Take it out; when it was the default, the version registered last takes its place."""
        model = self.model(version.name)
        if model.versions.get(version.version) is not version:
            return
        del model.versions[version.version]
        if not model.versions:
            del self._models[version.name]
        elif model.default == version.version:
            model.default = next(reversed(model.versions))
        self.generation += 1
        self.forget()


def _unavailable(label: str, failed: bool) -> ServiceUnavailableError:
    if failed:
        return ServiceUnavailableError(f"model {label} could not be restored; /readyz on the management port says why")
    return LoadingError(f"model {label} is still loading; try again soon")
