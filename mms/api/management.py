"""The management API of MMS and TorchServe, on its own listener. Translates HTTP to the control plane. aiohttp."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from mms.api.guard import Guard
from mms.api.openapi import Operation, Parameter, document, health, setting_parameters
from mms.archive import RUNTIMES
from mms.controlplane import ControlPlane
from mms.errors import (
    BadRequestError,
    MethodNotAllowedError,
    MMSError,
    ModelLoadError,
    NotFoundError,
    RequestTooLargeError,
    UnauthorizedError,
)
from mms.http.response import json_body
from mms.model_settings import MAX_WORKERS, ModelSettings
from mms.models.readiness import Readiness
from mms.models.version import ModelVersion
from mms.setting import nearest, parse_setting

log = logging.getLogger("mms.management")
http_log = logging.getLogger("mms.management.http")  # aiohttp's own, of this listener and that of the metrics

CONTROL = web.AppKey("control", ControlPlane)
READINESS = web.AppKey("readiness", Readiness)
MAX_BODY = 1 << 20
PAGE = 100
MAX_NUMBER = 10**9
MAX_TEXT = 8 << 10  # as in a query: what looks into addresses takes time that grows with the square of their length

_NOT_ALLOWED = "Requested method is not allowed, please refer to API document."
_AT_REGISTRATION = tuple(setting.name for setting in fields(ModelSettings))
_WHILE_SERVED = (
    "batch_size", "preferred_batch_sizes", "max_batch_delay",
    "queue_size", "queue_bytes", "queue_timeout", "queue_order",
)  # fmt: skip
_NO_REQUEST = (HttpProcessingError, web.RequestPayloadError)
_STRING = {"type": "string"}
_SYNCHRONOUS = Parameter("synchronous", {"type": "boolean"}, "answer when the workers are ready, not at once")

_Parameters = dict[str, Any]
_Handler = Callable[[web.Request, _Parameters], Awaitable[web.Response]]


def _is_fault(record: logging.LogRecord) -> bool:
    """A request that is none is its client's own affair; what aiohttp says of it quotes headers, tokens among them."""
    return not (record.exc_info and isinstance(record.exc_info[1], _NO_REQUEST))


http_log.addFilter(_is_fault)


def application(control: ControlPlane, readiness: Readiness, guard: Guard) -> web.Application:
    """The aiohttp application on the management listener."""
    app = web.Application(middlewares=[errors_as_json, guard.middleware], client_max_size=MAX_BODY)
    app[CONTROL] = control
    app[READINESS] = readiness
    for operation, handler in _TABLE:
        app.router.add_route(operation.method, operation.path, _translate(operation, handler))
    return app


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every failure as MMS's JSON; for the metrics port, too. The one broad except of the control plane."""
    try:
        return await handler(request)
    except MMSError as error:
        return _failure(error)
    except web.HTTPNotFound:
        return _failure(NotFoundError("Requested resource is not found, please refer to API document."))
    except web.HTTPMethodNotAllowed as error:
        return _failure(MethodNotAllowedError(_NOT_ALLOWED, allow=", ".join(sorted(error.allowed_methods))))
    except web.HTTPRequestEntityTooLarge:
        return _failure(RequestTooLargeError(f"the body is over the limit of {MAX_BODY} bytes"))
    except web.HTTPException as error:
        return _failure(BadRequestError(error.reason, status=error.status))
    except Exception:
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        return _failure(MMSError("the server failed to handle this; its log has the traceback"))


def _failure(error: MMSError) -> web.Response:
    body: dict[str, Any] = {"code": error.status, "type": error.type, "message": error.message}
    if isinstance(error, ModelLoadError) and error.traceback:
        body["traceback"] = error.traceback
    response = _json(body, error.status)
    if isinstance(error, UnauthorizedError):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowedError):
        response.headers["Allow"] = error.allow
    if error.retry_after:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=json_body(value), status=status, content_type="application/json")


def _translate(operation: Operation, handler: _Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    known = [parameter.name for parameter in operation.parameters]

    async def handle(request: web.Request) -> web.Response:
        parameters: _Parameters = dict(request.query)
        if len(parameters) < len(request.query):
            twice = next(name for name in parameters if len(request.query.getall(name)) > 1)
            raise BadRequestError(f"parameter {twice} stands more than once")
        if operation.body == "json" and request.can_read_body:
            parameters |= await _body(request)
        for name in parameters:
            if name not in known:
                if name in _AT_REGISTRATION:
                    raise BadRequestError(f"{name} can only be set when the model is registered")
                raise BadRequestError(f"unknown parameter {name}{nearest(name, known)}")
        given = {name: value for name, value in parameters.items() if value is not None}  # null: as if not there
        return await handler(request, given)

    return handle


async def _body(request: web.Request) -> _Parameters:
    if request.content_type != "application/json":
        raise BadRequestError(f"the body is {request.content_type}; send application/json or query parameters")
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except (ConnectionResetError, web.RequestPayloadError):
        raise BadRequestError("the body ends too early, or is not what its headers say") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not a JSON object: {error}") from None


async def _register(request: web.Request, parameters: _Parameters) -> web.Response:
    url = _text(parameters, "url")
    if not url:
        raise BadRequestError("Parameter url is required.")
    if "runtime" in parameters and parameters["runtime"] not in RUNTIMES:
        raise BadRequestError(f"Invalid RuntimeType value: {parameters['runtime']}")
    changes = {name: parameters[name] for name in _AT_REGISTRATION if name in parameters}
    if "initial_workers" in parameters:
        value = parameters["initial_workers"]
        changes["min_workers"] = parse_setting(ModelSettings, "min_workers", value, "request", called="initial_workers")
    synchronous = _flag(parameters, default=True)
    version = await request.app[CONTROL].register(
        url,
        name=_text(parameters, "model_name"),
        handler=_text(parameters, "handler"),
        sha256=_text(parameters, "sha256"),
        changes=changes,
        synchronous=synchronous,
    )
    log.info("registered %s from %s", version.label, version.archive.path.name)
    if not synchronous:
        return _status("Processing worker updates...", 202)
    workers = version.settings.min_workers
    hint = ". Use scale workers API to add workers for the model."
    if workers:
        hint = ""
    elif version.settings.load_on_request:
        hint = ". The first request loads it."
    return _status(f'Model "{version.name}" Version: {version.version} registered with {workers} initial workers{hint}')


async def _list(request: web.Request, parameters: _Parameters) -> web.Response:
    limit = min(_number(parameters, "limit", PAGE, low=1), PAGE)
    start = _number(parameters, "next_page_token", 0)
    models = sorted(request.app[CONTROL].registry, key=lambda model: model.name)
    page = {"models": [_entry(model.version()) for model in models[start : start + limit]]}
    if start + limit < len(models):
        return _json({"nextPageToken": str(start + limit), **page})
    return _json(page)


def _entry(version: ModelVersion) -> dict[str, str]:
    return {
        "modelName": version.name,
        "modelUrl": version.archive.path.name,
        "modelVersion": version.version,
        "state": str(version.state),
    }


async def _describe(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info.get("version", "")
    model = request.app[CONTROL].registry.model(name)
    version = model.version(number)
    await version.read_memory()
    await request.app[CONTROL].look()
    return _json(
        {
            **version.describe(),
            "defaultVersion": version.version == model.default,
            "versions": list(model.versions),
        }
    )


async def _change(request: web.Request, parameters: _Parameters) -> web.Response:
    control = request.app[CONTROL]
    name, number = request.match_info["model"], request.match_info.get("version", "")
    version = control.registry.version(name, number)
    changes = {key: parameters[key] for key in _WHILE_SERVED if key in parameters}
    synchronous = _flag(parameters, default=False)
    if changes and "min_worker" not in parameters and "max_worker" not in parameters:
        await control.change(name, number, changes)
        return _status(f"Settings changed for model: {version.label}")
    # neither given means 1, as in MMS
    unsaid = version.settings.min_workers if "max_worker" in parameters else 1
    least = _number(parameters, "min_worker", unsaid, high=MAX_WORKERS)
    most = _number(parameters, "max_worker", least, high=MAX_WORKERS)
    if most < least:
        raise BadRequestError("max_worker cannot be less than min_worker.")
    changes["max_workers"] = most
    if "min_worker" in parameters or "max_worker" not in parameters:
        changes["min_workers"] = least
    await control.change(name, number, changes, synchronous=synchronous)
    if not synchronous:
        return _status("Processing worker updates...", 202)
    running = version.pool.target if version.pool is not None else least
    return _status(f"Workers scaled to {running} for model: {name}, version: {version.version}")


async def _set_default(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info["version"]
    await request.app[CONTROL].set_default(name, number)
    log.info("%s %s is the default now", name, number)
    return _status(f'Default version successfully updated for model "{name}" to "{number}"')


async def _retry(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info.get("version", "")
    synchronous = _flag(parameters, default=True)
    version = await request.app[CONTROL].retry(name, number, synchronous=synchronous)
    if not synchronous:
        return _status("Processing worker updates...", 202)
    workers = version.pool.target if version.pool is not None else version.settings.min_workers
    return _status(f'Model "{version.name}" Version: {version.version} has {workers} workers')


async def _model_ready(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info.get("version", "")
    status, body = request.app[READINESS].of_version(request.app[CONTROL].registry.version(name, number))
    return _json(body, status)


async def _livez(request: web.Request, parameters: _Parameters) -> web.Response:
    return _status("alive")


async def _readyz(request: web.Request, parameters: _Parameters) -> web.Response:
    status, body = request.app[READINESS].report(details=True)
    return _json(body, status)


async def _unregister(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info.get("version", "")
    await request.app[CONTROL].unregister(name, number)
    log.info("unregistered %s %s", name, number or "(all versions)")
    return _status(f'Model "{name}" unregistered')


async def _clear_cache(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info["version"]
    count = request.app[CONTROL].clear_cache(name, number)
    log.info("cleared the cache of %s %s", name, number)
    return _status(f'Cache of model "{name}" Version: {number} cleared, answers: {count}')


async def _openapi(request: web.Request, parameters: _Parameters) -> web.Response:
    operations = (replace(row[0], statuses=tuple(sorted((*row[0].statuses, 401, 403)))) for row in _TABLE)
    return _json(document("MMS management API", "Register, scale, describe, retry, unregister.", operations))


def _status(text: str, status: int = 200) -> web.Response:
    return _json({"status": text}, status)


def _text(parameters: _Parameters, name: str) -> str:
    value = parameters.get(name, "")
    if not isinstance(value, str):
        raise BadRequestError(f"{name} = {value!r:.200}: a text is needed")
    if len(value) > MAX_TEXT:
        raise BadRequestError(f"{name} = {value:.200}: longer than {MAX_TEXT} characters")
    return value


def _flag(parameters: _Parameters, *, default: bool) -> bool:
    value = str(parameters.get("synchronous", default)).lower()
    if value not in ("true", "false"):
        raise BadRequestError(f"synchronous = {value}: true or false is needed")
    return value == "true"


def _number(parameters: _Parameters, name: str, default: int, *, low: int = 0, high: int = MAX_NUMBER) -> int:
    text = str(parameters.get(name, default))
    if not (text.isdecimal() and len(text) <= len(str(MAX_NUMBER)) and low <= int(text) <= high):
        raise BadRequestError(f"{name} = {text:.200}: a whole number from {low} to {high} is needed")
    return int(text)


_SCALE = (
    Parameter(
        "min_worker", {"type": "integer", "minimum": 0, "maximum": MAX_WORKERS},
        "workers to run at least (default: 1, or with max_worker alone as before)",
    ),
    Parameter(
        "max_worker", {"type": "integer", "minimum": 0, "maximum": MAX_WORKERS},
        "workers to run at most; above min_worker it turns autoscaling on (default: min_worker)",
    ),
    _SYNCHRONOUS,
    *setting_parameters(_WHILE_SERVED),
)  # fmt: skip
_TABLE: tuple[tuple[Operation, _Handler], ...] = (
    (
        Operation(
            "post", "/models", "Register an archive of the model store.", (200, 202, 400, 404, 409, 413, 500),
            (
                Parameter("url", _STRING, "the archive's file name in the model store, or a URL", required=True),
                Parameter("sha256", _STRING, "what the archive file's SHA-256 must be"),
                Parameter("model_name", _STRING, "serve it under this name (default: the manifest's)"),
                Parameter("handler", _STRING, "module:name instead of the manifest's handler"),
                Parameter("runtime", {"type": "string", "enum": list(RUNTIMES)}, "accepted for MMS's sake"),
                Parameter(
                    "initial_workers", {"type": "integer", "minimum": -1, "maximum": MAX_WORKERS},
                    "workers to start (default: min_workers of the archive or the server)",
                ),
                _SYNCHRONOUS,
                *setting_parameters(_AT_REGISTRATION),
            ),
            body="json", operation_id="register",
        ),
        _register,
    ),
    (
        Operation(
            "get", "/models", "The registered models, by name.", (200, 400),
            (
                Parameter("limit", {"type": "integer", "minimum": 1}, "models per page, at most 100"),
                Parameter(
                    "next_page_token", {"type": "integer", "minimum": 0}, "where the page begins, from the page before"
                ),
            ),
            operation_id="list",
        ),
        _list,
    ),
    (
        Operation("get", "/models/{model}", "Describe the default version.", (200, 400, 404), operation_id="describe"),
        _describe,
    ),
    (
        Operation(
            "get", "/models/{model}/ready", "Whether the default version has its workers.", (200, 400, 404, 503),
            operation_id="ready",
        ),
        _model_ready,
    ),
    (
        Operation(
            "get", "/models/{model}/{version}/ready", "Whether a version has its workers.", (200, 400, 404, 503),
            operation_id="ready_version",
        ),
        _model_ready,
    ),
    (
        Operation(
            "get", "/models/{model}/{version}", "Describe one version.", (200, 400, 404),
            operation_id="describe_version",
        ),
        _describe,
    ),
    (
        Operation(
            "put", "/models/{model}", "Scale the default version, or change its batching while it is served.",
            (200, 202, 400, 404, 409, 413, 500), _SCALE, body="json", operation_id="change",
        ),
        _change,
    ),
    (
        Operation(
            "put", "/models/{model}/{version}", "Scale one version, or change its batching while it is served.",
            (200, 202, 400, 404, 409, 413, 500), _SCALE, body="json", operation_id="change_version",
        ),
        _change,
    ),
    (
        Operation(
            "put", "/models/{model}/{version}/set-default", "Make a version the default.", (200, 400, 404, 409),
            operation_id="set_default",
        ),
        _set_default,
    ),
    (
        Operation(
            "post", "/models/{model}/retry", "Start the workers now that the default version lacks.",
            (200, 202, 400, 404, 409, 500, 503), (_SYNCHRONOUS,), operation_id="retry",
        ),
        _retry,
    ),
    (
        Operation(
            "post", "/models/{model}/{version}/retry", "Start the workers now that a version lacks.",
            (200, 202, 400, 404, 409, 500, 503), (_SYNCHRONOUS,), operation_id="retry_version",
        ),
        _retry,
    ),
    (
        Operation(
            "delete",
            "/models/{model}",
            "Unregister all versions, after draining.",
            (200, 400, 404),
            operation_id="unregister",
        ),
        _unregister,
    ),
    (
        Operation(
            "delete", "/models/{model}/{version}", "Unregister one version, after draining.", (200, 400, 404),
            operation_id="unregister_version",
        ),
        _unregister,
    ),
    (
        Operation(
            "delete", "/models/{model}/{version}/cache", "Forget the answers that a version's cache keeps.",
            (200, 400, 404), operation_id="clear_cache",
        ),
        _clear_cache,
    ),
    *zip(health("management"), (_livez, _readyz), strict=True),
    (Operation("get", "/openapi.json", "This document.", (200, 400), operation_id="management_openapi"), _openapi),
)  # fmt: skip
