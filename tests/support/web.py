"""A real web server in a thread that injects faults, and a file system for it that fails in fsspec's ways."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class AnswerError(Exception):
    """As aiohttp's ClientResponseError: not an OSError."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='{http.client.responses[status]}'")
        self.status = status


class Web(AbstractFileSystem):
    """`web://host:port/path`; like fsspec's HTTP file system it hides causes behind FileNotFoundError and False."""

    protocol = "web"
    cachable = False

    def _ask(self, method: str, path: str, **headers: str) -> tuple[Any, bytes]:
        host, _, name = path.partition("/")
        connection = http.client.HTTPConnection(host)
        try:
            connection.request(method, f"/{name}", headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status == 404:
            raise FileNotFoundError(path)
        if answer.status >= 400:
            raise AnswerError(answer.status)
        return answer, body

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        try:
            answer, _body = self._ask("HEAD", path)
        except Exception as error:
            raise FileNotFoundError(path) from error
        size = int(answer.headers["Content-Length"])
        return {"name": path, "size": size, "type": "file", "ETag": answer.headers["ETag"]}

    def exists(self, path: str, **_: Any) -> bool:
        try:
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        raise FileNotFoundError(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self._ask("GET", self._strip_protocol(path), Range=f"bytes={start}-{(end or 0) - 1}")[1]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return _WebFile(self, path, mode, block_size=1 << 16, cache_type="bytes")


class _WebFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start, end))


class Server:
    """What the server has and does.

    Attributes:
        files: content by path, with its slash.
        faults: by the number of the request, from 0: a status, `short` (half a body), `reset` or `hang`; for all others
            `always`.
        requests: (method, path) of all, so far.
        ranges: whether parts of a file can be asked for.
        tells_size: whether answers say how long they are.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[int, int | str] = {}
        self.always: int | str | None = None
        self.requests: list[tuple[str, str]] = []
        self.ranges = self.tells_size = True
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.address = ""

    def begin(self, faults: dict[int, int | str] | None = None) -> None:
        """Count requests from 0 again."""
        self.requests, self.faults, self.always = [], faults or {}, None


@contextmanager
def serving() -> Iterator[Server]:
    """A server at `web://{server.address}/…`."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with state.lock:
                number = len(state.requests)
                state.requests.append((self.command, self.path))
            fault = state.faults.get(number, state.always)
            self.close_connection = True
            if fault == "hang":
                state.closing.wait(600)
                return
            if fault == "reset":
                self.connection.close()
                return
            data = state.files.get(urlsplit(self.path).path)
            status = fault if isinstance(fault, int) else 404 if data is None else 200
            whole = data or b""
            if status == 200 and state.ranges and (limits := self.headers.get("Range")):
                first, last = (int(n) for n in limits.removeprefix("bytes=").split("-"))
                status, data = 206, whole[first : last + 1]
            self.send_response(status)
            body = b"" if status >= 400 else data or b""
            if state.tells_size:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha256(whole).hexdigest()[:16]}"')
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # the client may have given up
                    self.wfile.write(body[: len(body) // 2] if fault == "short" else body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fsspec.register_implementation("web", Web, clobber=True)
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
