"""The built-in handlers in this process: real exported networks, real pictures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy
import pytest
from PIL import Image

from mms.errors import BadRequestError
from mms.handler import Context, Handler, PredictionError, Request
from mms.wire import EMPTY_HEADERS, Load, RequestFactsView

if TYPE_CHECKING:
    from mms_handlers.image_classifier import ImageClassifier
    from mms_handlers.tensor import Tensor

MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    """Returns a function that makes the context of an archive extracted to `tmp_path`."""

    def make(
        file: str = "model.pt2",
        *,
        batch_size: int = 4,
        config: dict[str, Any] | None = None,
        model_file: str = "",
        lent: bool = False,
    ) -> Context:
        model = {"modelName": "m", "serializedFile": file} | ({"modelFile": model_file} if model_file else {})
        values: dict[str, Any] = {
            "model_name": "m",
            "version": "1.0",
            "directory": str(tmp_path),
            "manifest": {"model": model},
            "model_config": config or {},
            "batch_size": batch_size,
            "gpu": None,
        }
        empty = {field.name: None for field in msgspec.structs.fields(Load)}
        return Context(Load(**empty | values), "cpu", lambda: lent)

    return make


# What needs torch is imported by the tests that run, not by each process that collects them all: it takes seconds.


def export(path: Path, name: str, *shape: int, dynamic: bool = True) -> None:
    from tests.unit import networks

    (path / "model.pt2").write_bytes(networks.exported(name, shape, dynamic))


def save_weights(path: Path, file: str) -> None:
    from tests.unit import networks

    networks.save_weights(path, file)
    (path / "network.py").write_text(networks.SOURCE)


def request(body: bytes, content_type: str = "", query: bytes = b"") -> Request:
    facts = RequestFactsView(content_type, "", query, False, EMPTY_HEADERS)
    return Request(facts, b"r1", bytearray(body), 1 << 30)


def answers(handler: Handler, *requests: Request) -> list[Any]:
    """One batch through all stages, each answer as a client would read it."""
    outputs = handler.inference(handler.collate([handler.preprocess(each) for each in requests]))
    return [json.loads(msgspec.json.encode(handler.postprocess(output))) for output in outputs]


def classifier(context: Context) -> ImageClassifier:
    from mms_handlers.image_classifier import ImageClassifier

    handler = ImageClassifier()
    handler.initialize(context)
    return handler


def tensor(context: Context) -> Tensor:
    from mms_handlers.tensor import Tensor

    handler = Tensor()
    handler.initialize(context)
    return handler


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


PLAIN = {"image_classifier": {"resize": 32, "image_size": 24, "mean": [0, 0, 0], "std": [1, 1, 1], "top_k": 2}}


@pytest.fixture
def colours(tmp_path: Path, make_context: MakeContext) -> ImageClassifier:
    export(tmp_path, "Colours", 2, 3, 24, 24)
    (tmp_path / "index_to_name.json").write_text('{"0": "red", "1": ["n1", "green"], "2": "blue"}')
    return classifier(make_context(config=PLAIN))


def test_classifier_answers_the_most_likely_labels_first(colours: ImageClassifier) -> None:
    red, blue = answers(colours, request(picture((255, 99, 0))), request(picture((0, 99, 255))))
    assert list(red) == ["red", "green"]
    assert list(blue) == ["blue", "green"]
    assert red["red"] == pytest.approx(math.e / (math.e + math.exp(99 / 255) + 1), abs=1e-5)


def test_top_k_is_the_clients_choice_within_the_classes(colours: ImageClassifier) -> None:
    body = picture((255, 99, 0))
    one, all_of_them, default = answers(
        colours, request(body, query=b"top_k=1"), request(body, query=b"top_k=99999"), request(body)
    )
    assert (len(one), len(all_of_them), len(default)) == (1, 3, 2)


@pytest.mark.parametrize("value", [b"0", b"-1", b"many", b"", b"1e3", b"9" * 9999])
def test_top_k_must_be_a_whole_number(colours: ImageClassifier, value: bytes) -> None:
    with pytest.raises(PredictionError, match="top_k must be a whole number") as caught:
        colours.preprocess(request(picture((1, 2, 3)), query=b"top_k=" + value))
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"not a picture", picture((1, 2, 3))[:60], b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_the_clients_fault(colours: ImageClassifier, body: bytes) -> None:
    with pytest.raises(PredictionError, match="picture") as caught:
        colours.preprocess(request(body))
    assert caught.value.status == 400


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_any_mode_are_read(colours: ImageClassifier, mode: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 200), (200, 200, 200)).convert(mode).save(file, "TIFF")
    assert len(answers(colours, request(file.getvalue()))[0]) == 2


@pytest.mark.parametrize("photo", ["chelsea.png", "coffee.png"])
def test_photos(colours: ImageClassifier, photo: str) -> None:
    import skimage

    body = (Path(skimage.__file__).parent / "data" / photo).read_bytes()
    assert list(answers(colours, request(body, query=b"top_k=3"))[0]) == ["red", "green", "blue"]


def test_picture_in_a_form(colours: ImageClassifier) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
        + picture((0, 0, 255))
        + b"\r\n--x--\r\n"
    )
    assert next(iter(answers(colours, request(body, "multipart/form-data; boundary=x"))[0])) == "blue"


def test_labels_that_classes_share_are_told_apart(tmp_path: Path, make_context: MakeContext) -> None:
    export(tmp_path, "Colours", 2, 3, 24, 24)
    (tmp_path / "index_to_name.json").write_text('{"0": "crane", "2": "crane"}')
    handler = classifier(make_context(config=PLAIN))
    assert list(answers(handler, request(picture((255, 9, 0)), query=b"top_k=3"))[0]) == [
        "crane (0)",
        "1",
        "crane (2)",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 3}, "image_classifier has no topk; it has image_size"),
        ({"interpolation": "cubic"}, "interpolation 'cubic' is none of nearest"),
        ([1], "must hold 'key: value' lines"),
    ],
)
def test_wrong_settings_fail_the_load(tmp_path: Path, make_context: MakeContext, settings: Any, message: str) -> None:
    export(tmp_path, "Colours", 2, 3, 24, 24)
    with pytest.raises(ValueError, match=message):
        classifier(make_context(config={"image_classifier": settings}))


@pytest.mark.parametrize(("static", "batch_size"), [(1, 2), (8, 8), (2, 1)])
def test_static_batch_dimension_fails_the_load(
    tmp_path: Path, make_context: MakeContext, static: int, batch_size: int
) -> None:
    export(tmp_path, "Double", static, 3, dynamic=False)
    with pytest.raises(ValueError, match=f"model.pt2 was exported with a static batch dimension of {static}"):
        tensor(make_context(batch_size=batch_size))


def test_static_batch_of_one_serves_without_batching(tmp_path: Path, make_context: MakeContext) -> None:
    export(tmp_path, "Double", 1, 3, dynamic=False)
    assert answers(tensor(make_context(batch_size=1)), request(b"[1, 2, 3]")) == [[2, 4, 6]]


@pytest.mark.parametrize("body", [b"[1, 2.5, -3]", b'{"data": [1, 2.5, -3]}'])
def test_tensor_takes_json(tmp_path: Path, make_context: MakeContext, body: bytes) -> None:
    export(tmp_path, "Double", 2, 3)
    handler = tensor(make_context())
    assert answers(handler, request(body, "application/json"), request(b"[0, 0, 1]")) == [[2, 5, -6], [0, 0, 2]]


def test_tensor_takes_raw_numbers(tmp_path: Path, make_context: MakeContext) -> None:
    export(tmp_path, "Double", 2, 2, 3)
    handler = tensor(make_context(config={"tensor": {"input_shape": [2, 3]}}))
    body = numpy.arange(6, dtype="<f4").tobytes()
    assert answers(handler, request(body, "application/octet-stream")) == [[[0, 2, 4], [6, 8, 10]]]


def test_tensor_gives_all_outputs_of_a_network(tmp_path: Path, make_context: MakeContext) -> None:
    export(tmp_path, "Sums", 2, 3)
    assert answers(tensor(make_context()), request(b"[1, 2, 3]"), request(b"[4, 5, 6]")) == [
        [6, [2, 4, 6]],
        [15, [8, 10, 12]],
    ]


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"[1, 2]", "", r"shape \[3\], not \[2\]"),
        (b"[[1, 2, 3]]", "", r"shape \[3\], not \[1, 3\]"),
        (b"[[1], [2, 3]]", "", "the list is not a tensor: expected sequence of length 1"),
        (b'["1", 2, 3]', "", "the list is not a tensor"),
        (b"[null, 2, 3]", "", "the list is not a tensor"),
        (b"3", "", "must be a list of numbers"),
        (b'{"values": [1]}', "", "must be a list of numbers"),
        (b"12345678", "application/octet-stream", r"12 bytes: float32 numbers of shape \[3\]; it holds 8"),
    ],
)
def test_wrong_numbers_are_the_clients_fault(
    tmp_path: Path, make_context: MakeContext, body: bytes, content_type: str, message: str
) -> None:
    export(tmp_path, "Double", 2, 3)
    handler = tensor(make_context(config={"tensor": {"input_shape": [3]}}))
    with pytest.raises(PredictionError, match=message) as caught:
        handler.preprocess(request(body, content_type))
    assert caught.value.status == 400


def test_malformed_json_is_the_clients_fault(tmp_path: Path, make_context: MakeContext) -> None:
    export(tmp_path, "Double", 2, 3)
    with pytest.raises(BadRequestError, match="not valid JSON"):
        tensor(make_context()).preprocess(request(b"[1, 2"))


def test_s5_an_older_torch_reads_weights_from_safetensors_only(
    tmp_path: Path, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for file in ("weights.pt", "weights.safetensors"):
        save_weights(tmp_path, file)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    with pytest.raises(
        ValueError, match=r"weights\.pt is not read by torch 2\.9\.1\+cpu.* or save the weights as \.safet"
    ):
        tensor(make_context("weights.pt", model_file="network.py"))
    tensor(make_context("weights.safetensors", model_file="network.py"))


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_weights_go_into_the_model_file(tmp_path: Path, make_context: MakeContext, file: str) -> None:
    save_weights(tmp_path, file)
    handler = tensor(make_context(file, model_file="network.py"))
    assert answers(handler, request(b"[1, 2]")) == [[3, 6]]


def test_s5_pickled_network_is_never_unpickled(tmp_path: Path, make_context: MakeContext) -> None:
    import torch

    from tests.unit.networks import Double

    save_weights(tmp_path, "weights.pt")
    torch.save(Double(), tmp_path / "weights.pt")
    with pytest.raises(Exception, match="weights_only"):
        tensor(make_context("weights.pt", model_file="network.py"))


def test_model_file_with_several_networks_needs_a_name(tmp_path: Path, make_context: MakeContext) -> None:
    save_weights(tmp_path, "weights.pt")
    with (tmp_path / "network.py").open("a") as source:
        source.write("\nclass Other(torch.nn.Module):\n    pass\n")
    with pytest.raises(ValueError, match=r"defines 2 torch.nn.Module classes \(Double, Other\)"):
        tensor(make_context("weights.pt", model_file="network.py"))
    handler = tensor(make_context("weights.pt", model_file="network.py", config={"model_class": "Double"}))
    assert answers(handler, request(b"[1, 2]")) == [[3, 6]]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("file", ["old.pt", "old.ts"])
def test_torchscript_of_old_archives(tmp_path: Path, make_context: MakeContext, file: str) -> None:
    import torch

    from tests.unit.networks import Double

    torch.jit.script(Double()).save(str(tmp_path / file))
    assert answers(tensor(make_context(file)), request(b"[1, 2]")) == [[2, 4]]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", "the archive has no serialized file"),
        ("model.onnx", "the file name must end in one of .pt2"),
        ("weights.safetensors", "holds only weights; package it with model-archiver --model-file"),
        ("weights.pt", "weights.pt is not TorchScript"),
    ],
)
def test_files_that_cannot_be_loaded(tmp_path: Path, make_context: MakeContext, file: str, message: str) -> None:
    if file:
        save_weights(tmp_path, "weights.pt")
        (tmp_path / "weights.pt").rename(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        tensor(make_context(file))


def test_weights_that_are_lent_are_neither_read_nor_moved(tmp_path: Path, make_context: MakeContext) -> None:
    import torch
    from mms_handlers.loading import load_model

    from tests.unit.networks import Normed

    (tmp_path / "network.py").write_text("import torch\n\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n"
                                         "        super().__init__(2, 1)\n")  # fmt: skip
    (tmp_path / "model.pt").write_bytes(b"never read")
    assert load_model(make_context("model.pt", model_file="network.py", lent=True)).weight.shape == (1, 2)
    export(tmp_path, "Normed", 2, 2)
    network = Normed().eval()
    lent = load_model(make_context(lent=True))
    weights = {**dict(lent.named_parameters()), **dict(lent.named_buffers())}
    assert weights.keys() == network.state_dict().keys() and {each.device.type for each in weights.values()} == {"meta"}
    lent.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(lent(torch.ones(3, 2)), network(torch.ones(3, 2)))
