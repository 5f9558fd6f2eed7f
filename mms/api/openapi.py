"""The OpenAPI documents of both APIs, made from the tables that describe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any

import mms
from mms.caching import MAX_HEADERS, MAX_TTL
from mms.instances import MAX_AT_A_TIME, MAX_COUNT
from mms.model_settings import MAX_TIMEOUT, ModelSettings
from mms.setting import OneOf

_ERROR = {
    "type": "object",
    "required": ["code", "type", "message"],
    "properties": {
        "code": {"type": "integer"},
        "type": {"type": "string"},
        "message": {"type": "string"},
        "traceback": {"type": "string"},
    },
}
_MEANINGS = {
    200: "done",
    202: "accepted; workers start or stop in the background",
    400: "the request cannot be understood",
    401: "the token is missing or wrong",
    403: "a foreign Host or Origin",
    404: "no such model, version or archive",
    405: "not for this method",
    409: "exists already, or is being changed",
    413: "the body is over the limit",
    429: "the queue is full; see Retry-After",
    500: "the handler failed, or does not load",
    503: "no worker is ready, the worker died, or an upgrade goes on",
    504: "no answer within the time limits",
}

_KINDS = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
}  # of a setting's field -> JSON schema
_CACHE = {
    "type": "object",
    "properties": {
        "size": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]},
        "ttl_s": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": MAX_TTL},
        "headers": {"type": "array", "maxItems": MAX_HEADERS, "items": {"type": "string"}},
    },
}
_OBJECTS: dict[str, Mapping[str, Any]] = {"CacheSettings | None": _CACHE}
_GPU = {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}
_ITEMS: dict[str, dict[str, Any]] = {
    "tuple[int | str, ...]": _GPU,
    "tuple[int, ...]": {"type": "integer"},
    "tuple[str, ...]": {"type": "string"},
    "tuple[WarmupSample, ...]": {"type": "object"},
    "Groups": {
        "type": "object",
        "required": ["kind"],
        "properties": {
            "kind": {"type": "string", "enum": ["gpu", "cpu"]},
            "count": {"type": "integer", "minimum": 1, "maximum": MAX_COUNT},
            "gpus": {"type": "array", "items": _GPU},
            "threads": {"type": "integer", "minimum": 1, "maximum": MAX_AT_A_TIME},
        },
    },
}


@dataclass(frozen=True)
class Parameter:
    """A query parameter or header, those in the path follow from it. `in_json`: its schema in a body, if another."""

    name: str
    schema: Mapping[str, Any]
    description: str
    required: bool = False
    in_json: Mapping[str, Any] | None = None
    place: str = "query"


@dataclass(frozen=True)
class Operation:
    """One documented operation; `statuses` are all it answers with."""

    method: str
    path: str
    summary: str
    statuses: tuple[int, ...]
    parameters: tuple[Parameter, ...] = ()
    body: str = ""  # "any": a prediction's input, "json": the parameters as a JSON object
    result: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    operation_id: str = ""


_HEADERS = (
    Parameter(
        "x-request-timeout-ms",
        {"type": "number", "exclusiveMinimum": True, "minimum": 0, "maximum": MAX_TIMEOUT * 1000},
        "milliseconds in which the answer is of use; then 504, at once",
        place="header",
    ),
    Parameter(
        "x-request-priority",
        {"type": "integer", "minimum": 0},
        "1 is the highest; as many as the model's priority_levels",
        place="header",
    ),
)
_PREDICTION_STATUSES = (200, 400, 401, 404, 405, 413, 429, 500, 503, 504)


def _predictions() -> Iterable[Operation]:
    for suffix, what in (("", "the default version"), ("/{version}", "one version")):
        for method in ("post", "put", "get"):
            yield Operation(
                method,
                "/predictions/{model}" + suffix,
                f"Run {what} of a model on the body; the handler decides the answer's type.",
                _PREDICTION_STATUSES,
                _HEADERS,
                body="any" if method != "get" else "",
                result={},
                operation_id=f"predict_{method}{'_version' if suffix else ''}",
            )


def _invocations() -> Iterable[Operation]:
    for method in ("post", "put", "get"):
        yield Operation(
            method,
            "/invocations",
            "Run the only model, or the one that model_name names; the query parameters are inputs, too.",
            _PREDICTION_STATUSES,
            (Parameter("model_name", {"type": "string"}, "needed when more than one model is registered"), *_HEADERS),
            body="any" if method != "get" else "",
            result={},
            operation_id=f"invoke_{method}",
        )


def health(api: str) -> Iterable[Operation]:
    """The probes that both APIs answer."""
    yield Operation(
        "get", "/livez", "Answers as long as the server does anything.", (200,), operation_id=f"{api}_livez"
    )
    yield Operation(
        "get", "/readyz", "Whether the server should get requests, and which workers are missing if not.", (200, 503),
        operation_id=f"{api}_readyz",
    )  # fmt: skip


INFERENCE = (
    *_predictions(),
    *_invocations(),
    Operation(
        "get", "/ping", "Healthy when every version has all its workers, Partial Healthy, or Unhealthy.", (200,),
        operation_id="ping",
    ),
    *health("inference"),
    Operation("get", "/openapi.json", "This document.", (200,), operation_id="inference_openapi"),
)  # fmt: skip


def setting_parameters(names: Iterable[str]) -> tuple[Parameter, ...]:
    """Query parameters for fields of ModelSettings, with the field's own help."""
    known = {f.name: f for f in fields(ModelSettings)}
    return tuple(_setting_parameter(known[name]) for name in names)


def _setting_parameter(setting: Field[Any]) -> Parameter:
    kind, meta = str(setting.type), setting.metadata
    if (schema_in_json := _OBJECTS.get(kind)) is not None:
        return Parameter(
            setting.name, {"type": "string"}, f"{meta['help']}; in the query as JSON", in_json=schema_in_json
        )
    item = _ITEMS.get(kind)
    if item is not None:
        in_query = "as JSON" if item.get("type") == "object" else "separated by commas"
        text = f"{meta['help']}; in the query {in_query}"
        in_json = {"type": "array", "items": item}
        return Parameter(setting.name, {"type": "string"}, text, in_json=in_json)
    if kind == "Any":
        return Parameter(setting.name, {"type": "string"}, f"{meta['help']}; in the query a text", in_json={})
    schema: dict[str, Any] = {"type": _KINDS[kind]}
    if isinstance(meta["parse"], OneOf):
        schema["enum"] = list(meta["parse"].words)
    for word, bound in (("minimum", meta["low"]), ("maximum", meta["high"])):
        if bound is not None:
            schema[word] = bound
    return Parameter(setting.name, schema, meta["help"])


def document(title: str, description: str, operations: Iterable[Operation]) -> dict[str, Any]:
    """An OpenAPI 3.0.3 document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "description": description, "version": mms.__version__},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


@cache
def inference_document() -> dict[str, Any]:
    return document("MMS inference API", "Predictions and health.", INFERENCE)


def _operation(operation: Operation) -> dict[str, Any]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names] + [
        {
            "name": parameter.name,
            "in": parameter.place,
            "required": parameter.required and not operation.body,
            "description": parameter.description,
            "schema": parameter.schema,
        }
        for parameter in operation.parameters
    ]
    described: dict[str, Any] = {
        "operationId": operation.operation_id,
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {str(status): _response(operation, status) for status in operation.statuses},
    }
    if operation.body == "any":
        described["requestBody"] = {"content": {"*/*": {"schema": {}}}}
    elif operation.body == "json":
        properties = {
            p.name: {**(p.schema if p.in_json is None else p.in_json), "description": p.description}
            for p in operation.parameters
        }
        described["requestBody"] = {
            "content": {"application/json": {"schema": {"type": "object", "properties": properties}}}
        }
    return described


def _response(operation: Operation, status: int) -> dict[str, Any]:
    if status >= 400:
        schema: Mapping[str, Any] = {"$ref": "#/components/schemas/Error"}
    else:
        schema = operation.result
    media = "application/json" if schema else "*/*"
    return {"description": _MEANINGS[status], "content": {media: {"schema": schema}}}
