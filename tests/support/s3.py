"""A real S3 server (moto's) in a thread, behind a proxy that counts requests and injects faults."""

from __future__ import annotations

import http.client
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest

BUCKET = "bucket"

_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>Please reduce your request rate.</Message></Error>"
_CODES = {503: b"SlowDown", 500: b"InternalError", 429: b"TooManyRequests", 403: b"AccessDenied"}
_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}  # of one connection, not of the answer


class S3:
    """The proxy, in front of an S3 server that has one bucket.

    Attributes:
        faults: by the number of the request, from 0; `always` for all others. A status is answered instead of asking
            the server, `reset` closes the connection before, `lost` after the server has done what was asked, `hang`
            never answers, `short` breaks off in the middle of the body, `wrong` sends half of it as if it were all.
        requests: method and path of all, so far.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: dict[int, int | str] = {}
        self.always: int | str | None = None
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.address = ""
        self._client: Any = None

    def begin(self, faults: dict[int, int | str] | None = None) -> None:
        """Count requests from 0 again; stalled ones of earlier runs end."""
        self.closing.set()
        self.closing = threading.Event()
        self.requests, self.faults, self.always = [], faults or {}, None

    @property
    def client(self) -> Any:
        """Speaks with the server itself."""
        import boto3

        if self._client is None:
            self._client = boto3.client("s3", endpoint_url=f"http://{self.upstream}", region_name="us-east-1")
        return self._client

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def files(self, prefix: str = "") -> dict[str, bytes]:
        """The files whose names begin with `prefix`, by the rest of their names."""
        found = {}
        for name in self._names(prefix):
            body = self.client.get_object(Bucket=BUCKET, Key=name)["Body"]
            found[name.removeprefix(prefix)] = body.read()
            body.close()
        return found

    def clear(self, prefix: str) -> None:
        """Delete the files whose names begin with `prefix`."""
        for name in self._names(prefix):
            self.client.delete_object(Bucket=BUCKET, Key=name)

    def _names(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def _handler(state: S3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with state.lock:
                number = len(state.requests)
                state.requests.append(f"{self.command} {self.path}")
                fault = state.faults.get(number, state.always)
                closing = state.closing
            self.close_connection = True
            if fault == "hang":
                closing.wait(600)
            if fault in ("hang", "reset"):
                return
            if isinstance(fault, int):
                self._answer(fault, {}, _SLOW_DOWN % _CODES.get(fault, b"Fault"))
                return
            status, headers, data = self._ask(body)
            if fault == "lost":
                return
            cut = data[: len(data) // 2]
            if fault == "wrong" and self.command == "GET":
                self._answer(status, {**headers, "Content-Length": str(len(cut))}, cut)
            else:
                self._answer(status, headers, cut if fault == "short" else data)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(state.upstream)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in (*_HOP, "expect")}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                kept = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
                return answer.status, kept, answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[S3]:
    """An S3 server with an empty bucket at `s3://bucket`, found by its environment variables."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would log every request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    state = S3(f"127.0.0.1:{port}")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    proxy.daemon_threads = True
    state.address = f"127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{state.address}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # botocore leaves trying again to us
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            forget_file_systems()
            fsspec.filesystem("s3").mkdir(BUCKET)
            yield state
    finally:
        forget_file_systems()
        state.closing.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        state.client.close()
        moto.stop()


def forget_file_systems() -> None:
    """Make fsspec read credentials and endpoint again."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
