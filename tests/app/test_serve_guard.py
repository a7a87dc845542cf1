"""Who may ask `cbam serve`, and how much, tried on a bare ASGI application."""

import asyncio
import json

import pytest

from cbam.app.guard import MAX_BODY, Guard

HOST = "127.0.0.1:7860"


async def echo(scope, receive, send):
    """Reads the whole request and answers with its length."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"X-Content-Type-Options", b"none")]}
    )
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(headers: dict[str, str], parts: list[bytes] | None = None, kind: str = "http", app=echo):
    """(status or close code, headers, body, parts that were read)."""
    sent, parts = [], list(parts or [b""])
    read = []

    async def receive():
        part = parts.pop(0)
        read.append(len(part))
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    asyncio.run(Guard(app, [HOST, "localhost:7860"])({"type": kind, "headers": raw}, receive, send))
    first = sent[0]
    found = {key.lower(): value for key, value in first.get("headers", [])}
    return first.get("status", first.get("code")), found, b"".join(m.get("body", b"") for m in sent), read


def test_a_request_of_our_own_page_passes_and_gets_our_headers():
    for extra in ({}, {"Origin": f"http://{HOST}"}, {"Origin": "http://LOCALHOST:7860"}):
        status, headers, body, _ = ask({"Host": HOST, **extra}, [b"abc", b"de"])
        assert (status, body) == (200, b"5")
        assert b"default-src 'self'" in headers[b"content-security-policy"]
        assert headers[b"x-content-type-options"] == b"nosniff"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": f"{HOST}.evil.example"},
        {"Host": HOST, "Origin": "http://evil.example"},
        {"Host": HOST, "Origin": "null"},
        {"Host": HOST, "Origin": f"https://{HOST}"},
        {"Host": HOST, "Origin": "http://127.0.0.1:1"},
        {"Host": HOST, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)  # W8
def test_a_foreign_host_or_origin_is_refused(headers):
    status, found, _, read = ask(headers)
    assert status == 403
    assert read == []
    assert b"access-control-allow-origin" not in found
    assert ask(headers, kind="websocket")[0] == 1008


def test_a_link_from_elsewhere_opens_the_page():
    assert ask({"Host": HOST, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})[0] == 200


@pytest.mark.parametrize("length", [str(MAX_BODY + 1), None, "7"])  # W1
def test_too_much_is_refused_whatever_length_is_claimed(length):
    headers = {"Host": HOST} | ({} if length is None else {"Content-Length": length})
    status, _, _, read = ask(headers, [b"x" * 1_000_000] * 30)
    assert status == 413
    assert sum(read) <= MAX_BODY + 1_000_000


@pytest.mark.parametrize("length", ["-1", "many", "1e3"])
def test_a_length_that_is_no_number_is_refused(length):
    assert ask({"Host": HOST, "Content-Length": length})[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "http://169.254.169.254/",
        "https://a.b/c.png",
        "ftp://a/b",
        "file:///etc/passwd",
        " HTTP://x",
        "data:,x",
    ],
)  # W7
def test_addresses_are_not_fetched(path):
    body = json.dumps({"data": [{"path": path, "meta": {}}]}).encode()
    headers = {"Host": HOST, "Content-Type": "application/json"}
    hidden = body.replace(b"path", rb"p\u0061th")
    for parts in ([body], [body[:12], body[12:]], [hidden]):
        status, _, _, _ = ask(headers, parts)
        assert status == 400
    fine = json.dumps({"data": [{"path": "/folder/a.png", "url": f"http://{HOST}/a.png"}]}).encode()
    assert ask(headers, [fine])[0] == 200


def test_a_large_json_is_refused():
    assert ask({"Host": HOST, "Content-Type": "application/json"}, [b" " * 600_000] * 2)[0] == 413
