"""Request filter of `cbam serve`: allowed hosts and origins, size and time limits, security headers.

An ASGI middleware. It refuses a foreign Host (DNS rebinding) or Origin (another site), requests that are too
large, counted while they arrive, or too slow, and URLs for the server to fetch.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn

MAX_BODY = 10_000_000 + 100_000  # an image and the form around it
_MAX_JSON = 1_000_000
TIMEOUT = 30.0  # seconds within which a whole request must arrive
_FETCH = re.compile(rb'"path"\s*:\s*"\s*[A-Za-z][A-Za-z0-9+.-]*:')  # a URL in place of an uploaded file
HEADERS = {
    b"content-security-policy": b"default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    b"style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}

Message = dict[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


def addresses(host: str, port: int) -> list[str]:
    """The Host headers that a server on `host` accepts; the first is the one to show the user."""
    names = dict.fromkeys([host, "127.0.0.1", "localhost"]) if host in ("127.0.0.1", "localhost") else [host]
    called = [f"[{name}]" if ":" in name else name for name in names]  # IPv6
    return [f"{name}:{port}" for name in called] + (called if port == 80 else [])  # browsers omit port 80


class Guard:
    """`app`, restricted to requests to one of `hosts` ("127.0.0.1:7860") from pages of these hosts."""

    def __init__(self, app: App, hosts: Iterable[str], timeout: float = TIMEOUT) -> None:
        self._app, self._hosts = app, {host.lower().encode() for host in hosts}
        self._timeout = timeout
        self._origins = {b"http://" + host for host in self._hosts}

    async def __call__(self, scope: Message, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(headers)
        if refusal is None:
            body = _LimitedRequest(scope, headers, receive, send, self._timeout)
            try:
                await self._app(scope, body.receive, body.send)
            except Exception:
                if body.refusal is None:
                    raise
            refusal = body.refusal
            if refusal is None or body.answered:
                return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await _answer(send, *refusal)

    def _refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if headers.get(b"host", b"").lower() not in self._hosts:
            return 403, "this server only answers to its own host name"
        origin = headers.get(b"origin")
        if origin is not None and origin.lower() not in self._origins:
            return 403, "requests from pages of other sites are refused"
        if headers.get(b"sec-fetch-site") == b"cross-site" and headers.get(b"sec-fetch-mode") != b"navigate":
            return 403, "requests from pages of other sites are refused"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "the Content-Length is not a number"
        return (413, "the request is larger than 10 MB") if int(length) > MAX_BODY else None


class _RefusedError(Exception):
    """Stops the application's work on a request; its own response is not sent."""


class _LimitedRequest:
    """The messages of one request, with limits on what comes in and our headers on what goes out."""

    def __init__(self, scope: Message, headers: dict[bytes, bytes], receive, send, timeout: float) -> None:
        self._receive, self._send = receive, send
        self._timeout, self._deadline = timeout, asyncio.get_running_loop().time() + timeout
        self._json = b"json" in headers.get(b"content-type", b"")
        self._seen, self._tail, self.answered = 0, b"", False
        self.refusal: tuple[int, str] | None = None
        self._limit = _MAX_JSON if self._json else MAX_BODY
        self._arriving = scope["type"] == "http"

    async def receive(self) -> Message:
        message = await self._next()
        if message["type"] == "http.request":
            self._arriving = bool(message.get("more_body"))
            part = message.get("body", b"")
            self._seen += len(part)
            if self._seen > self._limit:
                self._refuse(413, f"the request is larger than {self._limit // 10**6} MB")
            if self._json:
                self._tail += part
                if _FETCH.search(self._tail) or _has_escaped_url(self._tail, message):
                    self._refuse(400, "URLs are not fetched")
        return message

    def _refuse(self, status: int, text: str) -> NoReturn:
        self.refusal = status, text
        raise _RefusedError

    async def _next(self) -> Message:
        if not self._arriving:  # only the disconnect can follow, at any time
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            self._refuse(408, f"the request took longer than {self._timeout:g} seconds to arrive")

    async def send(self, message: Message) -> None:
        if self.refusal is not None and not self.answered:
            return
        if message["type"] == "http.response.start":
            self.answered = True
            own = [(key, value) for key, value in message.get("headers", []) if key.lower() not in HEADERS]
            message = {**message, "headers": [*own, *HEADERS.items()]}
        await self._send(message)


def _has_escaped_url(body: bytes, message: Message) -> bool:
    """Whether a complete JSON body has a URL in a `path`, even if escaped."""
    if message.get("more_body"):
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False  # the application will refuse it
    return _has_url(content)


def _has_url(value: Any) -> bool:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            path = one.get("path")
            if isinstance(path, str) and re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*:", path):
                return True
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return False


async def _answer(send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
