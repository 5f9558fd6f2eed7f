"""The inference dialect of MMS and TorchServe: predictions, health. Translates HTTP to the data plane."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote

import msgspec

from mms.api.openapi import inference_document
from mms.dataplane import DataPlane
from mms.errors import BadRequestError, MethodNotAllowedError, MMSError, NotFoundError, UnauthorizedError
from mms.http.exchange import Exchange
from mms.http.request import Head
from mms.http.response import JSON, json_body
from mms.http.shedding import NO_REQUESTS, Shedding
from mms.models.readiness import Readiness
from mms.models.version import ModelVersion, VersionState
from mms.payload import parse_query
from mms.token import Token
from mms.wire import RequestFacts
from mms.workers.job import Job, Terms

MAX_ROUTES = 4096
_NOT_ALLOWED = "Requested method is not allowed, please refer to API document."
_METHODS = frozenset((b"POST", b"PUT", b"GET"))


@dataclass(frozen=True, slots=True)
class Route:
    """What a request target means, until the registry changes."""

    version: ModelVersion
    query: bytes
    query_is_input: bool


class Meaning(msgspec.Struct, eq=False):
    """What a whole head means, until the registry changes; kept on the head, which may come again."""

    generation: int
    version: ModelVersion
    facts: RequestFacts
    terms: Terms | None
    together: bool  # its requests are handed on with others of their turn, none is looked at for itself


class InferenceApi:
    """The application on the inference port. With a `token`, models are for those only who bring it."""

    def __init__(self, dataplane: DataPlane, readiness: Readiness, token: Token | None = None) -> None:
        self.failures: Counter[tuple[int, str]] = Counter()  # of requests that reached no model, by status and cause
        self._dataplane = dataplane
        self._registry = dataplane.registry
        self._own: dict[str, Callable[[], tuple[int, object]]] = {
            "/ping": lambda: (200, {"status": self._health()}),
            "/livez": lambda: (200, {"status": "alive"}),
            "/readyz": lambda: readiness.report(details=False),
            "/openapi.json": lambda: (200, inference_document()),
        }
        self._routes: dict[bytes, Route] = {}
        self._generation = -1
        self._token = token
        self._token_changes = 0

    def handle(self, exchanges: list[Exchange]) -> None:
        generation, next_id = self._registry.generation, self._dataplane.next_id
        by_version: dict[ModelVersion, list[Job]] = {}
        last: Head | None = None  # clients that say the same share one
        try:
            for exchange in exchanges:
                if exchange.head is not last:
                    last = exchange.head
                    meaning: Meaning | None = last.meaning
                    if meaning is None or meaning.generation != generation:
                        meaning = self._understand(exchange)
                        if meaning is None:
                            last = None
                            continue
                    version, facts, terms = meaning.version, meaning.facts, meaning.terms
                    jobs = by_version.setdefault(version, []) if meaning.together else None
                job = Job(
                    next_id(),
                    facts,
                    exchange.request_id,
                    exchange.parts,
                    exchange.size,
                    exchange,
                    exchange.arrived,
                    terms,
                )
                if jobs is not None:
                    exchange.work = job
                    jobs.append(job)
                else:
                    self._submit(version, job, exchange)
        finally:  # a fault in one must not cost those before it their answers
            for version, jobs in by_version.items():
                version.submit_all(jobs)

    def _submit(self, version: ModelVersion, job: Job, exchange: Exchange) -> None:
        try:
            exchange.work = version.submit(job)
        except MMSError as error:
            exchange.fail(error)

    def objection(self, head: Head, size: int) -> MMSError | None:
        meaning: Meaning | None = head.meaning
        if meaning is not None and meaning.generation == self._registry.generation:
            version, terms = meaning.version, meaning.terms
        else:
            path, query = _split(head.target)
            if path in self._own:
                return None
            try:
                version = self._route(head, path, query).version
            except MMSError as error:
                self.refused(error)
                return error
            try:
                terms = version.scheduling.terms(head.timeout, head.priority)
            except MMSError as error:
                version.count(error)
                return error
        refusal = version.refusal(size, terms)
        if refusal is not None:
            version.count(refusal)
        return refusal

    def refused(self, error: MMSError) -> None:
        self.failures[error.status, error.type] += 1

    def renew_token(self) -> None:
        """A token that is not the same any more: nothing is known any more of heads that have brought it."""
        if self._token is not None:
            self._token.refresh()
            if self._token.changes != self._token_changes:
                self._token_changes = self._token.changes
                self._registry.generation += 1

    def forget_routes(self) -> None:
        """They hold versions that may have been taken out."""
        self._routes.clear()

    def held(self) -> int:
        return sum([version.held for version in self._registry.versions()])

    def _understand(self, exchange: Exchange) -> Meaning | None:
        """What a head means that was not met since the registry changed; None when the request is answered here."""
        try:
            return self._meaning(exchange)
        except MMSError as error:
            exchange.fail(error)
            return None

    def _meaning(self, exchange: Exchange) -> Meaning | None:
        """As _understand; raises MMSError."""
        head, generation = exchange.head, self._registry.generation
        if self._generation != generation:
            self._routes.clear()
            self._generation = generation
        route = self._routes.get(head.target)
        if route is None or head.method not in _METHODS:
            route = self._find(exchange)
            if route is None:
                return None
        shedding = exchange.connection.shedding
        if shedding.step >= NO_REQUESTS:
            raise self._busy(shedding)
        try:
            terms = route.version.scheduling.terms(head.timeout, head.priority)
        except MMSError as error:
            route.version.count(error)
            raise
        headers = head.headers if self._token is None else _without_token(head.headers)
        facts = RequestFacts(head.content_type, head.encoding, route.query, route.query_is_input, headers)
        head.meaning = Meaning(generation, route.version, facts, terms, terms is None and route.version.alike)
        return cast(Meaning, head.meaning)

    def _busy(self, shedding: Shedding) -> MMSError:
        """Not a variable of the frame that raises it: that cycle would keep the request, and memory may be short."""
        busy = shedding.busy()
        self.refused(busy)
        return busy

    def _find(self, exchange: Exchange) -> Route | None:
        """The route of a target that is not known yet, or None when the request is answered here."""
        head = exchange.head
        try:
            path, query = _split(head.target)
            answer = self._own.get(path)
            if answer is not None:
                if head.method not in (b"GET", b"HEAD"):
                    raise MethodNotAllowedError(_NOT_ALLOWED, allow="GET, HEAD")
                status, body = answer()
                exchange.answer(status, JSON, json_body(body))
                return None
            route = self._route(head, path, query)
        except MMSError as error:
            self.refused(error)
            raise
        if not query and self._token is None and len(self._routes) < MAX_ROUTES:
            self._routes[head.target] = route
        return route

    def _route(self, head: Head, path: str, query: bytes) -> Route:
        if self._token is not None and not self._token.admits(_authorization(head.headers)):
            raise UnauthorizedError("the inference API needs its token: Authorization: Bearer TOKEN")
        route = self._prediction(path, query)
        if head.method not in _METHODS:
            raise MethodNotAllowedError(_NOT_ALLOWED, allow="GET, POST, PUT")
        return route

    def _prediction(self, path: str, query: bytes) -> Route:
        first, _, rest = path[1:].partition("/")
        if first == "predictions" and rest:
            name, _, version = rest.partition("/")
            return Route(self._dataplane.resolve(unquote(name), unquote(version)), query, False)
        if first == "invocations" and not rest:
            return Route(self._invoked(query), query, True)
        raise NotFoundError("Requested resource is not found, please refer to API document.")

    def _invoked(self, query: bytes) -> ModelVersion:
        """The model that `model_name` names, or the only one there is."""
        name = parse_query(query).get("model_name", "")
        if not name:
            models = list(self._dataplane.registry)
            if len(models) != 1:
                raise BadRequestError("Parameter model_name is required.")
            name = models[0].name
        return self._dataplane.resolve(name)

    def _health(self) -> str:
        """As MMS has it: Healthy when every version has all its workers, Unhealthy when there are none at all."""
        versions = self._dataplane.registry.versions()
        wanted = sum(version.pool.owed for version in versions if version.pool)
        ready = sum(min(version.pool.ready, version.pool.owed) for version in versions if version.pool)
        if (
            ready == wanted
            and not self._dataplane.registry.announced
            and all(version.state is not VersionState.LOADING for version in versions)
        ):
            return "Healthy"
        return "Partial Healthy" if ready else "Unhealthy"


def _split(target: bytes) -> tuple[str, bytes]:
    """Path (still escaped, without a trailing slash) and query of an origin-form or absolute-form target."""
    if target[:7].lower() == b"http://":
        target = b"/" + target[7:].partition(b"/")[2]
    path, _, query = target.partition(b"?")
    text = path.decode("latin-1")
    return (text.rstrip("/") or "/"), query


def _authorization(headers: list[bytes]) -> list[bytes]:
    return [value for name, value in zip(headers[::2], headers[1::2], strict=True) if name.lower() == b"authorization"]


def _without_token(headers: list[bytes]) -> list[bytes]:
    """The headers that a handler sees: the token is for the server."""
    pairs = zip(headers[::2], headers[1::2], strict=True)
    return [part for pair in pairs if pair[0].lower() != b"authorization" for part in pair]
