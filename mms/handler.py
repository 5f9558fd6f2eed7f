"""What a handler's author sees: Handler, Request, Response, Context, PredictionError. Runs in the worker process.

Two styles. Batch style (MMS, TorchServe): `handle(data, context)`, where data is a list with one dict per request and
the result a list of the same length. Request style: a subclass of Handler with `preprocess`, `inference` and
`postprocess`.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import msgspec

from mms import payload, wire
from mms.handler_metrics import Metrics

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Context", "Handler", "Headers", "PredictionError", "Request", "Response"]


class PredictionError(Exception):
    """Raise it, or return it for one request of a batch: that client gets `status` and `message`, the error's text."""

    message = ""  # for subclasses that do not call __init__
    status = 400

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


@dataclass(frozen=True, slots=True)
class Response:
    """An answer with its own status, content type or headers; `body` as any other result (bytes, str, JSON-able)."""

    body: Any
    status: int = 200
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Headers(Mapping[str, str]):
    """Request headers; names are looked up without regard to case, of a repeated name the last wins."""

    def __init__(self, pairs: Sequence[bytes]) -> None:
        self._values = {
            pairs[i].decode("latin-1").lower(): pairs[i + 1].decode("latin-1") for i in range(0, len(pairs), 2)
        }

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Request(msgspec.Struct, eq=False):
    """One request, as its handler sees it. Nothing is decoded before it is asked for."""

    _facts: wire.RequestFactsView
    _id: bytes
    _body: bytearray
    _limit: int
    _unpacked: bool = False
    _form: list[payload.FormPart] | None = None
    _headers: Headers | None = None

    @property
    def id(self) -> str:
        """The request id: the client's `x-request-id` where it sent a valid one."""
        return self._id.decode()

    @property
    def content_type(self) -> str:
        return self._facts.content_type

    @property
    def headers(self) -> Headers:
        if self._headers is None:
            self._headers = Headers(wire.decode_headers(self._facts.headers))
        return self._headers

    @property
    def query(self) -> dict[str, str]:
        """The query parameters. Raises BadRequestError."""
        return payload.parse_query(self._facts.query) if self._facts.query else {}

    @property
    def body(self) -> bytearray:
        """The body, unpacked if it came as gzip or deflate. Raises BadRequestError, RequestTooLargeError."""
        if self._facts.encoding and not self._unpacked:
            self._body = payload.unpack(self._body, self._facts.encoding, self._limit)
            self._unpacked = True
        return self._body

    @property
    def form(self) -> list[payload.FormPart]:
        """The fields of a multipart or urlencoded form; empty for other content types. Raises BadRequestError."""
        if self._form is None:
            self._form = payload.parse_form(self.body, self.content_type) if payload.is_form(self.content_type) else []
        return self._form

    def json(self) -> Any:
        """The body as JSON, whatever its content type. Raises BadRequestError."""
        return payload.decode_json(self.body)

    def text(self) -> str:
        """The body as UTF-8 text. Raises BadRequestError."""
        return payload.decode_text(self.body)

    def data(self) -> bytearray:
        """The uploaded bytes: the field `data`, `body` or `file` of a form, else its first field, else the body."""
        if not self.form:
            return self.body
        fields = {part.name: part.data for part in reversed(self.form)}
        return next((fields[name] for name in ("data", "body", "file") if name in fields), self.form[0].data)

    def image(self) -> Image:
        """The uploaded picture as an RGB PIL image. Raises PredictionError (400) when it is none."""
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(io.BytesIO(self.data())).convert("RGB")
        except UnidentifiedImageError:
            raise PredictionError("the body is not a picture in a known format") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise PredictionError(f"the picture cannot be read: {type(error).__name__}") from None

    def row(self) -> dict[str, Any]:
        """The request as MMS hands it to `handle(data, context)`. Raises BadRequestError."""
        facts = self._facts
        content_type = facts.content_type
        if content_type and payload.is_form(content_type):
            row = {part.name: part.value() for part in self.form}
        else:
            row = {"body": payload.decoder(content_type)(self.body if facts.encoding else self._body)}
        return self.query | row if facts.query_is_input else row


class Requests(Sequence[Request]):
    """The requests of a batch. Each is made when one of them is looked at: in batch style a handler may need none."""

    __slots__ = ("_bodies", "_facts", "_ids", "_limit", "_made")

    def __init__(
        self, facts: list[wire.RequestFactsView], ids: list[bytes], bodies: list[bytearray], limit: int
    ) -> None:
        """`facts` are one for all or one for each."""
        self._facts = facts
        self._ids = ids
        self._bodies = bodies
        self._limit = limit
        self._made: list[Request] | None = None

    @classmethod
    def made(cls, requests: list[Request]) -> Requests:
        """Those that were looked at before."""
        others = cls([one._facts for one in requests], [one._id for one in requests], [], 0)
        others._made = requests
        return others

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> Requests: ...

    def __getitem__(self, index: int | slice) -> Request | Requests:
        if not isinstance(index, slice):
            return self.all()[index]
        if self._made is not None:
            return self.made(self._made[index])
        facts = self._facts if len(self._facts) == 1 else self._facts[index]
        return Requests(facts, self._ids[index], self._bodies[index], self._limit)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.all())

    def all(self) -> list[Request]:
        made = self._made
        if made is None:
            facts = itertools.repeat(self._facts[0]) if len(self._facts) == 1 else self._facts
            made = self._made = list(map(Request, facts, self._ids, self._bodies, itertools.repeat(self._limit)))
        return made

    def rows(self) -> list[dict[str, Any]]:
        """`row` of each; how to decode is found out once if all say the same. Raises BadRequestError."""
        facts = self._facts[0]
        content_type = facts.content_type
        if (
            self._made is not None
            or len(self._facts) > 1
            or facts.encoding
            or facts.query_is_input
            or (content_type and payload.is_form(content_type))
        ):
            return [request.row() for request in self.all()]
        decode = payload.decoder(content_type)
        if decode is payload.as_it_is:
            return [{"body": body} for body in self._bodies]
        return [{"body": decode(body)} for body in self._bodies]


class Context:
    """The worker's facts and, during a batch, its requests; the members are those that MMS handlers know."""

    def __init__(self, load: wire.Load, device: str, are_lent: Callable[[], bool] = lambda: False) -> None:
        self._are_lent = are_lent
        self.model_name = load.model_name
        self.model_version = load.version
        self.manifest = load.manifest
        self.config = load.model_config
        self.model_dir = Path(load.directory)
        self.device = device
        self.system_properties: dict[str, Any] = {
            "model_dir": load.directory,
            "gpu_id": load.gpu,
            "batch_size": load.batch_size,
            "server_name": "MMS",
            "server_version": load.manifest.get("modelServerVersion", ""),
        }
        self.metrics = Metrics()
        self.requests: Sequence[Request] = ()
        self.responses: dict[int, ResponseHead] = {}  # what the handler has set, by index in the batch

    @property
    def model_yaml_config(self) -> dict[str, Any]:
        """The archive's model-config.yaml (TorchServe's name for `config`)."""
        return self.config

    @property
    def weights_are_lent(self) -> bool:
        """Whether the parameters and buffers of the handler's networks are replaced when `initialize` has returned.

        With share_weights on a GPU, by those of another process that has loaded the same. Then a network may stay on
        the CPU or on torch's device meta, and its weights need not be read.
        """
        return self._are_lent()

    def path(self, name: str) -> Path:
        """A file of the archive. Raises FileNotFoundError that names the archive's files when it is not there."""
        path = self.model_dir / name
        if not path.exists():
            there = sorted(entry.name for entry in self.model_dir.iterdir())
            raise FileNotFoundError(f"{name} is not in the archive of {self.model_name}; it holds: {', '.join(there)}")
        return path

    def for_thread(self) -> Context:
        """The same facts for another thread, with requests and answers of its own.

        This one, which the handler may have kept, then shows each thread what that thread's own does.
        """
        if type(self) is Context:
            self.__class__ = _KeptContext
            del self.requests, self.responses
            vars(self)["_of_thread"] = threading.local()
        other = copy(self)
        other.__class__ = _ThreadContext
        other.requests, other.responses = (), {}
        return other

    def begin_batch(self, requests: Sequence[Request]) -> None:
        """Called by the worker's loop before each batch."""
        self.requests = requests
        if self.responses:
            self.responses = {}

    @property
    def request_ids(self) -> dict[int, str]:
        return {idx: request.id for idx, request in enumerate(self.requests)}

    def get_request_id(self, idx: int = 0) -> str:
        return self.requests[idx].id

    def get_request_header(self, idx: int, key: str) -> str | None:
        return self.requests[idx].headers.get(key)

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        return dict(self.requests[idx].headers)

    def set_response_content_type(self, idx: int, value: str) -> None:
        self._head(idx).content_type = value

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self._head(idx).headers[key] = value

    def get_response_headers(self, idx: int) -> dict[str, str]:
        return dict(self._head(idx).headers)

    def get_response_content_type(self, idx: int) -> str:
        return self._head(idx).content_type

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """The status of answer `idx`; the phrase is accepted for MMS's sake and not sent."""
        self._head(idx).status = code

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        for idx in range(len(self.requests)):
            self.set_response_status(code, phrase, idx)

    def get_response_status(self, idx: int) -> int:
        return self._head(idx).status

    def _head(self, idx: int) -> ResponseHead:
        return self.responses.setdefault(idx, ResponseHead())


class _ThreadContext(Context):
    """One thread's own."""

    _of_thread: threading.local

    def begin_batch(self, requests: Sequence[Request]) -> None:
        super().begin_batch(requests)
        self._of_thread.context = self


class _KeptContext(Context):
    """What `initialize` was given, where several threads serve."""

    _of_thread: threading.local

    def __getattr__(self, name: str) -> Any:
        if name in ("requests", "responses"):
            own = getattr(self._of_thread, "context", None)
            if own is not None:
                return getattr(own, name)
            return () if name == "requests" else {}
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


@dataclass(slots=True)
class ResponseHead:
    """What a batch-style handler has set for one answer."""

    status: int = 200
    content_type: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Handler:
    """Base of request-style handlers. Override what the model needs; `initialize` and `inference` suffice for most."""

    def initialize(self, context: Context) -> None:
        """Once per worker, before it takes requests: load the model onto `context.device`."""

    def after_fork(self, context: Context) -> None:
        """With share_weights on the CPU, once per worker after it was forked from the process that ran `initialize`.

        Open here what workers cannot share (connections, files), start threads, seed random generators of your own.
        """

    def preprocess(self, request: Request) -> Any:
        """Per request: the item that goes into the batch. An exception fails this request only."""
        return request.data()

    def bucket_by(self, item: Any) -> Hashable:
        """Per request: only items with equal values share a batch (their shape, say). By default all may."""
        return None

    def collate(self, items: list[Any]) -> Any:
        """Per batch: tensors and arrays are stacked along a new first axis, anything else stays a list; may pad."""
        return _stack(items)

    def inference(self, batch: Any) -> Any:
        """Per batch: as many outputs, in order, as there are items."""
        raise TypeError(f"{type(self).__name__} must define inference(batch)")

    def postprocess(self, output: Any) -> Any:
        """Per request: the answer (bytes, str, anything JSON can hold, or a Response).

        An exception fails this request only.
        """
        return output


def _stack(items: list[Any]) -> Any:
    first = items[0]
    stack: Callable[[list[Any]], Any] | None = None
    match type(first).__module__.partition(".")[0]:
        case "torch":
            import torch

            stack = torch.stack if isinstance(first, torch.Tensor) else None
        case "numpy":
            import numpy

            stack = numpy.stack
    return items if stack is None else stack(items)
