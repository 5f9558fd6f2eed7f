"""Every error that MMS reports, in one tree: the class carries the HTTP status and the type that clients see.

`message` is one line that says what is wrong, where, and what to do about it. The wire form is
`{"code": 404, "type": "ModelNotFoundException", "message": "..."}`.
"""

from __future__ import annotations


class MMSError(Exception):
    """Raised for anything MMS reports; the client sees `status` and `type`. Do not retry, unless a subclass says so."""

    status = 500
    type = "InternalServerException"
    retry_after = 0  # seconds, sent as `Retry-After`; 0: nothing is sent

    def __init__(self, message: str, *, status: int | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if status is not None:
            self.status = status
        if retry_after is not None:
            self.retry_after = retry_after


class BadRequestError(MMSError):
    """The request cannot be understood: from the front end, the management API or a worker's decoder. Do not retry."""

    status = 400
    type = "BadRequestException"


class UnauthorizedError(MMSError):
    """The API wants its token, and this call brought none or a wrong one. Do not retry."""

    status = 401
    type = "UnauthorizedException"


class ForbiddenError(MMSError):
    """A management call for a name that is not this server's, or from a page of another site. Do not retry."""

    status = 403
    type = "ForbiddenException"


class NotFoundError(MMSError):
    """No such path. Do not retry."""

    status = 404
    type = "ResourceNotFoundException"


class ModelNotFoundError(NotFoundError):
    """No model of that name is registered, or the store has no such archive. Do not retry."""

    type = "ModelNotFoundException"


class ModelVersionNotFoundError(NotFoundError):
    """The model is registered, but not in that version. Do not retry."""

    type = "ModelVersionNotFoundException"


class MethodNotAllowedError(MMSError):
    """The path exists, but not for this method; those in `allow` are sent as `Allow`. Do not retry."""

    status = 405
    type = "MethodNotAllowedException"

    def __init__(self, message: str, *, allow: str = "", status: int | None = None) -> None:
        super().__init__(message, status=status)
        self.allow = allow


class ConflictError(MMSError):
    """The model version is registered already, or is being changed by another call. Retry after that call."""

    status = 409
    type = "ConflictStatusException"


class RequestTooLargeError(MMSError):
    """The body, or what it unpacks to, is over `max_request_size`. Do not retry."""

    status = 413
    type = "RequestEntityTooLargeException"


class OverloadError(MMSError):
    """There is more work than can be done in time. Retry after `retry_after` seconds (sent as `Retry-After`)."""

    status = 429
    type = "TooManyRequestsException"
    retry_after = 1


class QueueFullError(OverloadError):
    """`queue_size` requests wait already: raised by BatchQueue. Retry after `Retry-After`."""


class QueueBytesError(OverloadError):
    """The bodies that wait are `queue_bytes` already: raised by BatchQueue. Retry after `Retry-After`."""

    type = "TooManyBytesException"


class QueueWaitError(OverloadError):
    """The wait would be longer than `queue_timeout`: raised by BatchQueue. Retry after `Retry-After`."""

    type = "WaitTooLongException"


class ServerBusyError(OverloadError):
    """The front end runs out of descriptors or of `max_bytes_in_flight`. Retry after `Retry-After`."""

    type = "ServerBusyException"


class ServiceUnavailableError(MMSError):
    """No worker can take the request now: failed, scaled to 0, or no connection more can be held. Retry later.

    One that failed to load is tried again after `retry_after` seconds.
    """

    status = 503
    type = "ServiceUnavailableException"


class LoadingError(ServiceUnavailableError):
    """The model is still loading. Retry soon."""

    type = "ModelLoadingException"


class DrainingError(ServiceUnavailableError):
    """The version is being unloaded, or the server stops. Retry on another server."""

    type = "DrainingException"


class UpgradingError(ServiceUnavailableError):
    """Another server is taking over; what is registered stays as it was told. Retry after `retry_after` seconds."""

    type = "UpgradingException"
    retry_after = 5


class WorkerDiedError(MMSError):
    """The worker process died with this request in hand; 500 when it was tried twice, 503 when it was not retried."""

    status = 503
    type = "WorkerDiedException"


class DeadlineError(MMSError):
    """The request waited too long, or its batch ran longer than `response_timeout`. Retry when load is lower."""

    status = 504
    type = "DeadlineExceededException"


class ObjectiveError(DeadlineError):
    """The model's latency objective was missed, or could only be missed."""

    type = "ObjectiveMissedException"


class SubstituteError(MMSError):
    """Not an error to the client: it gets the model's default output, which this carries, in place of an answer."""

    status = 200
    type = ""

    def __init__(self, head: bytes, body: bytes) -> None:
        super().__init__("answered with default_output")
        self.head = head
        self.body = body


class HandlerError(MMSError):
    """The handler failed, or answered with something that cannot be sent. The traceback is in the model's log."""

    status = 500
    type = "HandlerException"


class ArchiveError(MMSError):
    """The archive is broken, unsafe or does not match its manifest: raised before anything of it is used."""

    status = 400
    type = "InvalidModelException"


class DownloadError(MMSError):
    """The archive cannot be downloaded, or is not the one that was asked for. Retry when its server is well again."""

    status = 400
    type = "DownloadArchiveException"


class ModelLoadError(MMSError):
    """The archive is sound but its handler did not become ready; `traceback` holds the worker's last words."""

    status = 500
    type = "ModelLoadException"

    def __init__(self, message: str, *, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class ConfigError(MMSError):
    """A setting is unknown, malformed or impossible: raised while the configuration is read, before anything starts."""

    status = 400
    type = "ConfigException"


class StartError(MMSError):
    """The server cannot start here: a port or run directory in use, no model store, nginx refused its configuration."""


class FrameError(MMSError):
    """The bytes on a worker's channel are not a frame. The conversation is over: the worker is killed and replaced."""
