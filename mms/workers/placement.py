"""Where the workers of a pool run: the places that `instances` plans, and which one the next worker takes.

Pure. Front end's process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mms.errors import ConfigError
from mms.instances import MAX_COUNT, InstanceGroup
from mms.model_settings import ModelSettings
from mms.workers.gpus import Gpu


@dataclass(frozen=True, slots=True)
class Place:
    """What one worker gets: a GPU or none, and how many batches it runs at a time.

    `hides_gpus`: there are GPUs that it must not see.
    """

    gpu: Gpu | None
    threads: int = 1
    hides_gpus: bool = False

    @property
    def kind(self) -> str:
        return "cpu" if self.gpu is None else "gpu"

    def environment(self) -> dict[str, str]:
        """The variables with which a process sees its own GPU alone, or none."""
        if self.gpu is not None:
            return self.gpu.environment()
        return {"CUDA_VISIBLE_DEVICES": ""} if self.hides_gpus else {}


@dataclass(frozen=True, slots=True)
class _Planned:
    group: int
    order: int  # in its group
    count: int


class Placement:
    """The plan: so many workers at each place, groups in their order, the devices of a group in turn.

    Fewer workers than planned take its first places; more go through it again from its beginning.
    """

    def __init__(self, groups: Sequence[tuple[InstanceGroup, Sequence[Place]]]) -> None:
        self.groups = tuple(groups)
        self._planned: dict[Place, _Planned] = {}
        for number, (group, places) in enumerate(self.groups):
            for order, place in enumerate(places):
                known = self._planned.get(place)
                if known is None:
                    self._planned[place] = _Planned(number, order, group.count)
                else:  # named twice
                    self._planned[place] = _Planned(known.group, known.order, known.count + group.count)

    @property
    def size(self) -> int:
        """How many workers are planned."""
        return sum(planned.count for planned in self._planned.values())

    @property
    def gpus(self) -> tuple[int, ...]:
        """The numbers of all GPUs in it."""
        return tuple(sorted({place.gpu.index for place in self._planned if place.gpu is not None}))

    def next(self, taken: Iterable[Place]) -> Place:
        """Where one more worker runs beside those that have `taken` a place."""
        running = Counter(taken)
        return min(self._planned, key=lambda place: self._turn(place, running[place]))

    def last(self, taken: Iterable[Place]) -> Place:
        """The place of these that is given up first: the one that was last in turn."""
        running = Counter(taken)
        return max(running, key=lambda place: self._turn(place, running[place] - 1))

    def crowded(self, workers: int) -> set[Gpu]:
        """The GPUs on which several of so many `workers` run."""
        running: Counter[Place] = Counter()
        for _ in range(workers):
            running[min(self._planned, key=lambda place: self._turn(place, running[place]))] += 1
        on = Counter(place.gpu for place in running.elements() if place.gpu is not None)
        return {gpu for gpu, count in on.items() if count > 1}

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "kind": group.kind,
                "count": group.count,
                **({"gpus": [place.gpu.index for place in places if place.gpu]} if group.kind == "gpu" else {}),
                "threads": places[0].threads,
            }
            for group, places in self.groups
        ]

    def _turn(self, place: Place, running: int) -> tuple[int, int, int, int]:
        """When the place gets a worker beside those that it has: which round, group, round of the group, device."""
        planned = self._planned[place]
        return running // planned.count, planned.group, running % planned.count, planned.order


def plan(settings: ModelSettings, gpus: Sequence[Gpu], cores: int) -> Placement:
    """The plan of `instances`; without it one worker per GPU (of those chosen), or without GPUs one per core.

    `gpus` are those that the server sees. Raises ConfigError, with the list of these, for others.
    """
    groups: Sequence[InstanceGroup] = settings.instances
    if not groups:
        if settings.device == "gpu" and not gpus:
            raise ConfigError("device = gpu: this machine has no GPU that the server can see")
        on_gpus = settings.device != "cpu" and (settings.gpus or gpus)
        groups = [InstanceGroup("gpu", gpus=settings.gpus) if on_gpus else InstanceGroup("cpu", count=cores)]
    placement = Placement([(group, _places(group, settings, gpus)) for group in groups])
    if placement.size > MAX_COUNT:
        raise ConfigError(f"instances: {placement.size} workers in all, at most {MAX_COUNT} can be")
    return placement


def _places(group: InstanceGroup, settings: ModelSettings, gpus: Sequence[Gpu]) -> list[Place]:
    threads = group.threads or settings.threads
    if group.kind == "cpu":
        return [Place(None, threads, hides_gpus=bool(gpus))]
    seen = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus) or "none"
    if not gpus and not group.gpus:
        raise ConfigError(f"instances: kind gpu needs a GPU; this server sees: {seen}")
    found = [(entry, _find(entry, gpus)) for entry in group.gpus or range(len(gpus))]
    missing = [str(entry) for entry, gpu in found if gpu is None]
    if missing:
        verb = "does" if len(missing) == 1 else "do"
        raise ConfigError(f"gpus: {', '.join(missing)} {verb} not exist; this server sees: {seen}")
    return [Place(gpu, threads) for gpu in dict.fromkeys(gpu for _, gpu in found)]


def _find(entry: int | str, gpus: Sequence[Gpu]) -> Gpu | None:
    """By its number, its UUID, or the beginning of one, as CUDA has it."""
    if isinstance(entry, int):
        return gpus[entry] if entry < len(gpus) else None
    found = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else next((gpu for gpu in found if gpu.uuid == entry), None)
