"""A real HTTP proxy on a free port of this machine, which fails, waits and cuts off when it is told to."""

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote

_PATIENCE_SECS = 30.0
_OF_ONE_CONNECTION = {"connection", "expect", "keep-alive", "transfer-encoding"}
_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchBucket",
    409: "ConditionalRequestConflict",
    429: "SlowDown",
    500: "InternalError",
    502: "BadGateway",
    503: "SlowDown",
}

How = Literal["status", "reset", "reset after", "silence", "silence after", "cut request", "cut answer"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        how: "status": the proxy answers with an error of its own. "reset": the connection is reset before
            the server is asked, "reset after": when the server has done it. "silence": nothing is asked and
            nothing answered, "silence after": nothing is answered to what the server has done. "cut request":
            the server gets half of the body, and the client a reset. "cut answer": the client gets half.
        status: of "status"; ``code``, what S3 would call it, where the usual name of the status is not meant.
    """

    how: How
    status: int = 503
    code: str = ""


@dataclass
class Request:
    """A request that came, as far as it came.

    Attributes:
        path: with every ``%xx`` decoded; ``query`` as it came.
        size: how many bytes of a body were announced.
        start: when it came, by ``time.monotonic``; ``end``, when it was answered, or was not.
        status: the answer's; None while there is none, and where there never was.
    """

    index: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    size: int
    start: float
    end: float | None = None
    status: int | None = None
    fault: Fault | None = None


Answer = tuple[int, list[tuple[str, str]], bytes]
Chooser = Callable[[int, Request], Fault | None]


class Proxy:
    """Between clients and one server.

    Attributes:
        url: what clients use in place of the server's URL.
        latency_secs: added before each answer.
        faults: is asked what goes wrong with a request, by its index and record.
        requests: every one so far, in the order in which they came.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self.latency_secs = 0.0
        self.faults: Chooser = lambda _index, _request: None
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def clear(self) -> None:
        """Forget the requests so far, and let nothing go wrong from now on."""
        with self._lock:
            self.requests = []
            self.faults = lambda _index, _request: None
            self.latency_secs = 0.0

    def record(self, method: str, target: str, headers: Mapping[str, str], size: int) -> Request:
        path, _, query = target.partition("?")
        with self._lock:
            request = Request(
                len(self.requests), method, unquote(path), query, headers, size, time.monotonic()
            )
            self.requests.append(request)
        request.fault = self.faults(request.index, request)
        return request


@contextmanager
def run_proxy(server: str) -> Iterator[Proxy]:
    """Run a proxy for the server at a URL."""
    running = Proxy(server)
    thread = threading.Thread(target=running._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running._http.shutdown()
        running._http.server_close()
        for connection in list(running._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # which ends a silence
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.proxy._connections.add(self.connection)

    def finish(self) -> None:
        self.proxy._connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the client went away
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        request = self.proxy.record(self.command, self.path, dict(self.headers.items()), size)
        try:
            self._carry_out(request)
        finally:
            request.end = time.monotonic()

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the server looks for these names

    def _carry_out(self, request: Request) -> None:
        how = request.fault.how if request.fault else None
        if how == "silence":
            self._keep_silent()
            return
        body = self.rfile.read(request.size // 2 if how == "cut request" else request.size)
        if how == "cut request":
            self._ask_half(body)
        if how in {"reset", "cut request"}:
            self._reset()
            return
        status, headers, content = (
            self._refuse(request.fault.status, request.fault.code) if how == "status" else self._ask(body)
        )
        time.sleep(self.proxy.latency_secs)
        if how == "reset after":
            self._reset()
        elif how == "silence after":
            self._keep_silent()
        else:
            request.status = status
            lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
            lines += [f"{name}: {value}" for name, value in headers]
            answer = "\r\n".join([*lines, "", ""]).encode("latin-1")
            whole = answer + (b"" if self.command == "HEAD" else content)
            if how == "cut answer":
                whole = whole[: -(len(content) // 2) if content else len(answer) // 2]
                self.close_connection = True
            self.wfile.write(whole)

    def _refuse(self, status: int, code: str) -> Answer:
        text = "This is what the test asked for."
        if self.path.startswith(("/storage/v1", "/upload/storage/v1")):
            content = json.dumps({"error": {"code": status, "message": text}}).encode()
        else:
            content = (
                f"<Error><Code>{code or _CODES[status]}</Code><Message>{text}</Message></Error>".encode()
            )
        return status, [("Content-Length", str(len(content)))], content

    def _ask(self, body: bytes) -> Answer:
        server = http.client.HTTPConnection(self.proxy.server.removeprefix("http://"), timeout=_PATIENCE_SECS)
        try:
            self._send(server, body, len(body))
            answer = server.getresponse()
            content = answer.read()
        finally:
            server.close()
        dropped = _OF_ONE_CONNECTION if self.command == "HEAD" else {*_OF_ONE_CONNECTION, "content-length"}
        headers = [
            (name, value.replace(self.proxy.server, self.proxy.url))  # where to go on with an upload, say
            for name, value in answer.getheaders()
            if name.lower() not in dropped
        ]
        if self.command != "HEAD" and answer.status != http.HTTPStatus.NO_CONTENT:
            headers.append(("Content-Length", str(len(content))))
        return answer.status, headers, content

    def _ask_half(self, body: bytes) -> None:
        server = http.client.HTTPConnection(self.proxy.server.removeprefix("http://"), timeout=_PATIENCE_SECS)
        self._send(server, body, int(self.headers.get("Content-Length", 0)))
        server.close()

    def _send(self, server: http.client.HTTPConnection, body: bytes, size: int) -> None:
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # the host too, which is part of a signature
            if name.lower() not in {*_OF_ONE_CONNECTION, "content-length"}:
                server.putheader(name, value)
        server.putheader("Content-Length", str(size))
        server.endheaders(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.rfile.close()  # which keeps the socket open
        self.close_connection = True

    def _keep_silent(self) -> None:
        while self.rfile.read(1 << 16):
            pass
        self.close_connection = True
