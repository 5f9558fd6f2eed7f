"""What is registered: ModelRegistry → Model → ModelVersion, with an explicit default version."""

from __future__ import annotations

from collections.abc import Iterator

from mms.errors import ConflictError, LoadingError, ModelNotFoundError, ModelVersionNotFoundError
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
    """All models. `generation` changes whenever a name or a default may mean something else."""

    def __init__(self) -> None:
        self.generation = 0
        self.announced: set[str] = set()  # names that are about to be registered
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
            if name in self.announced:
                raise LoadingError(f"model {name} is still loading; try again soon") from None
            raise ModelNotFoundError(f"Model not found: {name}") from None

    def version(self, name: str, version: str = "") -> ModelVersion:
        """Raises ModelNotFoundError or ModelVersionNotFoundError."""
        return self.model(name).version(version)

    def add(self, version: ModelVersion) -> None:
        """Raises ConflictError when name and version are taken."""
        model = self._models.setdefault(version.name, Model(version.name))
        if version.version in model.versions:
            raise ConflictError(f"Model version {version.version} is already registered for model {version.name}")
        model.versions[version.version] = version
        self.announced.discard(version.name)
        if not model.default:
            model.default = version.version
        self.generation += 1

    def set_default(self, name: str, version: str) -> None:
        model = self.model(name)
        model.version(version)
        model.default = version
        self.generation += 1

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
