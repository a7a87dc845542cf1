"""Who may ask `cbam serve`, and how much, tried on a bare ASGI application."""

import asyncio
import json

import pytest

from cbam.app.guard import MAX_BODY, Guard, addresses

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
def test_a_large_body_is_refused_for_any_claimed_length(length):
    headers = {"Host": HOST} | ({} if length is None else {"Content-Length": length})
    status, _, _, read = ask(headers, [b"x" * 1_000_000] * 30)
    assert status == 413
    assert sum(read) <= MAX_BODY + 1_000_000


@pytest.mark.parametrize("length", ["-1", "many", "1e3"])
def test_an_invalid_length_is_refused(length):
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
def test_urls_are_not_fetched(path):
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


def slowly(parts: list[bytes], pauses: list[float], patience: float, after: float = 0.0):
    """(status, seconds) of a request whose parts come after these pauses."""
    sent = []
    waits = iter(zip(pauses, parts, range(len(parts) - 1, -1, -1), strict=True))

    async def receive():
        pause, part, left = next(waits, (after, None, 0))
        await asyncio.sleep(pause)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": left > 0}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await echo(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    async def work() -> float:
        began = asyncio.get_running_loop().time()
        scope = {"type": "http", "headers": [(b"host", HOST.encode())]}
        await Guard(app, [HOST], patience)(scope, receive, send)
        return asyncio.get_running_loop().time() - began

    return sent, asyncio.run(work())


@pytest.mark.parametrize("pauses", [[60.0], [0.0, 60.0], [0.06] * 10])  # W11
def test_a_slow_request_times_out(pauses):
    sent, seconds = slowly([b"a"] * len(pauses), pauses, patience=0.2)
    assert sent[0]["status"] == 408
    assert b"longer than 0.2 seconds" in sent[1]["body"]
    assert seconds < 5


def test_the_time_limit_is_that_of_the_body_and_not_of_the_answer():  # W11
    sent, seconds = slowly([b"a", b"bc"], [0.0, 0.01], patience=0.2, after=0.5)
    assert sent[0]["status"] == 200
    assert sent[1]["body"] == b"3"
    assert seconds > 0.4


def test_an_application_that_turns_every_error_into_a_500_does_not_answer_for_us():
    """Starlette does; and a form parser may wrap what it caught."""

    async def eager(scope, receive, send):
        try:
            await echo(scope, receive, send)
        except Exception as error:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
            raise ExceptionGroup("wrapped", [error]) from error

    status, _, body, _ = ask({"Host": HOST}, [b" " * 6_000_000] * 2, app=eager)
    assert (status, body) == (413, b"the request is larger than 10 MB")


def test_an_application_crash_is_passed_through():
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask({"Host": HOST}, app=broken)


@pytest.mark.parametrize(
    ("host", "port", "called"),
    [
        ("127.0.0.1", 7860, ["127.0.0.1:7860", "localhost:7860"]),
        ("::1", 7860, ["[::1]:7860"]),
        ("example.org", 80, ["example.org:80", "example.org"]),
    ],
)
def test_a_server_accepts_its_host_name_as_browsers_write_it(host, port, called):  # W8
    assert addresses(host, port) == called
