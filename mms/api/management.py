"""The management API of MMS and TorchServe, on its own listener. Translates HTTP to the control plane. aiohttp."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from mms.api.guard import Guard
from mms.api.openapi import Operation, Parameter, document, setting_parameters
from mms.config import nearest
from mms.controlplane import ControlPlane
from mms.errors import (
    BadRequestError,
    MethodNotAllowedError,
    MMSError,
    ModelLoadError,
    NotFoundError,
    UnauthorizedError,
)
from mms.http.response import json_body
from mms.models.version import ModelVersion

log = logging.getLogger("mms.management")

CONTROL = web.AppKey("control", ControlPlane)
MAX_BODY = 1 << 20
PAGE = 100

_AT_REGISTRATION = (
    "batch_size", "max_batch_delay", "min_workers", "max_workers", "response_timeout", "startup_timeout", "queue_size",
    "queue_timeout", "retry", "isolate_errors", "device", "gpus", "threads", "preload",
)  # fmt: skip
_WHILE_SERVED = ("batch_size", "max_batch_delay", "queue_size", "queue_timeout")
_SYNCHRONOUS = Parameter("synchronous", "boolean", "answer when the workers are ready, not at once")

_Parameters = dict[str, Any]
_Handler = Callable[[web.Request, _Parameters], Awaitable[web.Response]]


def application(control: ControlPlane, guard: Guard) -> web.Application:
    """The aiohttp application on the management listener."""
    app = web.Application(middlewares=[errors_as_json, guard.middleware], client_max_size=MAX_BODY)
    app[CONTROL] = control
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
    except web.HTTPMethodNotAllowed:
        return _failure(MethodNotAllowedError("Requested method is not allowed, please refer to API document."))
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
    return response


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=json_body(value), status=status, content_type="application/json")


def _translate(operation: Operation, handler: _Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
    known = [parameter.name for parameter in operation.parameters]

    async def handle(request: web.Request) -> web.Response:
        parameters: _Parameters = dict(request.query)
        if operation.body == "json" and request.can_read_body:
            parameters |= await _body(request)
        for name in parameters:
            if name not in known:
                raise BadRequestError(f"unknown parameter {name}{nearest(name, known)}")
        return await handler(request, parameters)

    return handle


async def _body(request: web.Request) -> _Parameters:
    if request.content_type != "application/json":
        raise BadRequestError(f"the body is {request.content_type}; send application/json or query parameters")
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not a JSON object: {error}") from None


async def _register(request: web.Request, parameters: _Parameters) -> web.Response:
    if not parameters.get("url"):
        raise BadRequestError("Parameter url is required.")
    if parameters.get("runtime", "python") not in ("python", "python3"):
        raise BadRequestError(f"Invalid RuntimeType value: {parameters['runtime']}")
    changes = {name: parameters[name] for name in _AT_REGISTRATION if name in parameters}
    if "initial_workers" in parameters:
        changes["min_workers"] = parameters["initial_workers"]
    synchronous = _flag(parameters, default=True)
    version = await request.app[CONTROL].register(
        str(parameters["url"]),
        name=str(parameters.get("model_name", "")),
        handler=str(parameters.get("handler", "")),
        sha256=str(parameters.get("sha256", "")),
        changes=changes,
        synchronous=synchronous,
    )
    log.info("registered %s from %s", version.label, version.archive.path.name)
    if not synchronous:
        return _status("Processing worker updates...", 202)
    workers = version.settings.min_workers
    hint = "" if workers else ". Use scale workers API to add workers for the model."
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
    return _json(
        {**version.describe(), "defaultVersion": version.version == model.default, "versions": list(model.versions)}
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
    least = _number(parameters, "min_worker", 1)
    most = _number(parameters, "max_worker", least)
    if most < least:
        raise BadRequestError("max_worker cannot be less than min_worker.")
    changes |= {"min_workers": least, "max_workers": most}
    await control.change(name, number, changes, synchronous=synchronous)
    if not synchronous:
        return _status("Processing worker updates...", 202)
    return _status(f"Workers scaled to {least} for model: {name}, version: {version.version}")


async def _set_default(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info["version"]
    request.app[CONTROL].set_default(name, number)
    log.info("%s %s is the default now", name, number)
    return _status(f'Default version successfully updated for model "{name}" to "{number}"')


async def _unregister(request: web.Request, parameters: _Parameters) -> web.Response:
    name, number = request.match_info["model"], request.match_info.get("version", "")
    await request.app[CONTROL].unregister(name, number)
    log.info("unregistered %s %s", name, number or "(all versions)")
    return _status(f'Model "{name}" unregistered')


async def _openapi(request: web.Request, parameters: _Parameters) -> web.Response:
    operations = (replace(row[0], statuses=tuple(sorted((*row[0].statuses, 401, 403)))) for row in _TABLE)
    return _json(document("MMS management API", "Register, scale, describe, unregister.", operations))


def _status(text: str, status: int = 200) -> web.Response:
    return _json({"status": text}, status)


def _flag(parameters: _Parameters, *, default: bool) -> bool:
    value = str(parameters.get("synchronous", default)).lower()
    if value not in ("true", "false"):
        raise BadRequestError(f"synchronous = {value}: true or false is needed")
    return value == "true"


def _number(parameters: _Parameters, name: str, default: int, *, low: int = 0) -> int:
    text = str(parameters.get(name, default))
    if not text.isdecimal() or int(text) < low:
        raise BadRequestError(f"{name} = {text}: a whole number of at least {low} is needed")
    return int(text)


_SCALE = (
    Parameter("min_worker", "integer", "workers to run (default 1)"),
    Parameter("max_worker", "integer", "kept and shown; nothing scales up to it yet (default: min_worker)"),
    _SYNCHRONOUS,
    *setting_parameters(_WHILE_SERVED),
)
_TABLE: tuple[tuple[Operation, _Handler], ...] = (
    (
        Operation(
            "post", "/models", "Register an archive of the model store.", (200, 202, 400, 404, 409, 500),
            (
                Parameter("url", "string", "the archive's file name in the model store, or a URL", required=True),
                Parameter("sha256", "string", "what the archive file's SHA-256 must be"),
                Parameter("model_name", "string", "serve it under this name (default: the manifest's)"),
                Parameter("handler", "string", "module:name instead of the manifest's handler"),
                Parameter("runtime", "string", "python; accepted for MMS's sake"),
                Parameter("initial_workers", "integer", "workers to start (default: one per GPU, else per core)"),
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
                Parameter("limit", "integer", "models per page, at most 100"),
                Parameter("next_page_token", "integer", "where the page begins, from the page before"),
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
            "get", "/models/{model}/{version}", "Describe one version.", (200, 400, 404),
            operation_id="describe_version",
        ),
        _describe,
    ),
    (
        Operation(
            "put", "/models/{model}", "Scale the default version, or change its batching while it is served.",
            (200, 202, 400, 404, 409, 500), _SCALE, operation_id="change",
        ),
        _change,
    ),
    (
        Operation(
            "put", "/models/{model}/{version}", "Scale one version, or change its batching while it is served.",
            (200, 202, 400, 404, 409, 500), _SCALE, operation_id="change_version",
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
    (Operation("get", "/openapi.json", "This document.", (200, 400), operation_id="management_openapi"), _openapi),
)  # fmt: skip
