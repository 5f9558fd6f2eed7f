"""Answers with what the body names; none of it can be sent."""

from mms.handler import Handler, Response

ANSWERS = {
    b"object": object(),
    b"nested": {"a": [object()]},
    b"surrogate": "\ud800",
    b"header": Response(b"", headers={"x-a": "1\r\nx-b: 2"}),
    b"framing": Response(b"", headers={"Content-Length": "7"}),
    b"status": Response(b"", status=99),
    b"large": b"x" * (2 << 20),
}


class Unencodable(Handler):
    def inference(self, batch):
        return [ANSWERS.get(bytes(item), bytes(item)) for item in batch]
