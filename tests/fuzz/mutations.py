"""Changed and joined examples, as hypothesis draws them: it makes a failing one small."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.targets import MAX_SIZE, seeds

TOKENS: dict[str, tuple[bytes, ...]] = {
    "http": (
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"0",
        b"0\r\n\r\n",
        b"3\r\nabc\r\n",
        b";",
        b",",
        b"chunked",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 0\r\n",
        b"Host: a\r\n",
        b"identity, ",
        b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"Expect: 100-continue\r\n",
        b"HTTP/1.0",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /p HTTP/1.1\r\n",
        b"\0",
        b"\x0b",
        b"\xff",
        b"+",
        b"-",
        b"x",
        b"_",
        b"*",
    ),
    "codec": (b"MMS", b"\0", b"\xff", b"\x90", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc1"),
    "archive": (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\0", b"\xff\xff\xff\xff", b"../", b"/", b"a"),
    "manifest": (b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"1", b"..", b"/", b"\\u0000", b"1e999", b"NaN"),
    "yaml": (
        b"a: ",
        b"- ",
        b"\n",
        b"  ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"? ",
        b"!!int ",
        b"!!binary ",
        b"<<",
        b"*a",
        b"&a ",
        b"|",
        b">",
        b"'",
        b'"',
        b"#",
        b"---",
        b"...",
        b"\t",
        b"%YAML 1.1\n",
        b"0x",
        b":60",
        b"=",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
    ),
    "multipart": (
        b"--XX",
        b"--XX--",
        b"\r\n",
        b"\r\n\r\n",
        b"--",
        b"\r",
        b"\n",
        b":",
        b";",
        b'"',
        b"\\",
        b"=",
        b"\0",
        b"\xff",
        b'Content-Disposition: form-data; name="a"',
        b"; filename=",
        b"content-type: application/json",
    ),
    "body": (b"{", b"[", b"]", b'"', b"\\u", b"1e", b"-", b"0", b"\x1f\x8b", b"\0", b"\xff", b"&", b"=", b"%"),
}


@st.composite
def mutations(draw: st.DrawFn, name: str) -> bytes:
    """One or two of the target's examples, changed in up to six places; or its tokens in a row."""
    examples, tokens = seeds(name), st.sampled_from(TOKENS[name])
    if draw(st.integers(0, 7)) == 0:
        return b"".join(draw(st.lists(tokens | st.binary(max_size=4), max_size=30)))
    data = bytearray(draw(st.sampled_from(examples)))
    if draw(st.integers(0, 3)) == 0:
        data += draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from((0, 1, 1, 2, 4, 16, 100)))
        match draw(st.sampled_from(("token", "token", "byte", "delete", "repeat"))):
            case "token":
                data[at : at + (size if size < 3 else 0)] = draw(tokens)
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "delete":
                del data[at : at + size]
            case _:
                data[at:at] = data[at : at + size]
    return bytes(data[:MAX_SIZE])
