"""The OpenAPI documents of both APIs, made from the tables that describe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any

import mms
from mms.config import ModelSettings, OneOf

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
_ITEMS = {"tuple[int, ...]": "integer", "tuple[str, ...]": "string", "tuple[WarmupSample, ...]": "object"}


@dataclass(frozen=True)
class Parameter:
    """A query parameter; path parameters follow from the path. `in_json`: its schema in a body, where that differs."""

    name: str
    schema: Mapping[str, Any]
    description: str
    required: bool = False
    in_json: Mapping[str, Any] | None = None


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


_PREDICTION_STATUSES = (200, 400, 401, 404, 405, 413, 429, 500, 503, 504)


def _predictions() -> Iterable[Operation]:
    for suffix, what in (("", "the default version"), ("/{version}", "one version")):
        for method in ("post", "put", "get"):
            yield Operation(
                method,
                "/predictions/{model}" + suffix,
                f"Run {what} of a model on the body; the handler decides the answer's type.",
                _PREDICTION_STATUSES,
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
            (Parameter("model_name", {"type": "string"}, "needed when more than one model is registered"),),
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
    item = _ITEMS.get(kind)
    if item is not None:
        text = f"{meta['help']}; in the query {'as JSON' if item == 'object' else 'separated by commas'}"
        in_json = {"type": "array", "items": {"type": item}}
        return Parameter(setting.name, {"type": "string"}, text, in_json=in_json)
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
            "in": "query",
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
        properties = {p.name: {**(p.in_json or p.schema), "description": p.description} for p in operation.parameters}
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
