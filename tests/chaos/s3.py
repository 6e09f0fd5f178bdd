"""An S3 on a bad day: moto's, behind a server that passes requests on and answers back, or not."""

from __future__ import annotations

import http.client
import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from config import Bucket, parse_objects
from errors import Gone
from ops.embedded.ports import HOST
from storage.s3 import S3Store

SLOW, HANGING = 1.5, 30.0
"""Seconds: to an answer that comes late, and to one that nobody waits for."""
HOP = frozenset({"connection", "content-length", "date", "keep-alive", "server"})
"""Headers of one connection, or of one server."""


class Fault(Enum):
    """What becomes of a request that goes wrong."""

    BUSY = "503 SlowDown"
    BROKEN = "500 InternalError"
    SKEWED = "403 RequestTimeTooSkewed"
    LATE = "an error after success"
    SILENT = "a connection closed after success"
    SLOW = "late"
    HANGING = "no answer for longer than anybody waits"
    CUT = "half of an answer"


WEIGHTS = dict.fromkeys(Fault, 10) | {Fault.HANGING: 1}
"""How often, compared to each other."""
BEFORE = {Fault.BUSY, Fault.BROKEN, Fault.SKEWED}


class FaultyS3:
    """A bucket. `rate` is the share of requests about its objects that go wrong from now on, as
    often in each way as `weights` has it."""

    def __init__(self, seed: int):
        # Loaded where it is used: it takes seconds.
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self.rate = 0.0
        self.weights: Mapping[Fault, int] = WEIGHTS
        self.faults: Counter[Fault] = Counter()
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._moto = ThreadedMotoServer(HOST, 0, verbose=False)
        self._moto.start()
        _, self.port = self._moto.get_host_and_port()
        self._bucket = f"chaos-{secrets.token_hex(4)}"
        self._front = _Front(self)
        self._thread = threading.Thread(target=self._front.serve_forever, daemon=True)
        self._thread.start()
        bucket = parse_objects(self._url(self.port))
        assert isinstance(bucket, Bucket)
        self._store = S3Store(bucket)

    @property
    def url(self) -> str:
        """Where it can go wrong."""
        return self._url(self._front.server_port)

    def _url(self, port: int) -> str:
        return f"s3://access:secret@{HOST}:{port}/{self._bucket}?secure=false"

    def holds(self, key: str) -> bool:
        """Asked behind the back of what goes wrong."""
        try:
            self._store.size(key)
        except Gone:
            return False
        return True

    def fate(self, path: str) -> Fault | None:
        """Of the next request."""
        with self._lock:
            if path.count("/") < 2 or self._dice.random() >= self.rate:
                return None
            (fault,) = self._dice.choices(list(self.weights), list(self.weights.values()))
            self.faults[fault] += 1
            return fault

    def close(self) -> None:
        self._front.shutdown()
        self._front.server_close()
        self._moto.stop()


class _Front(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, s3: FaultyS3):
        super().__init__((HOST, 0), _Request)
        self.s3 = s3

    def handle_error(self, *_: object) -> None:
        pass  # Clients that leave are what this is about.


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Front

    def _pass(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.s3.fate(self.path.partition("?")[0])
        if fault in BEFORE:
            self._refuse(fault)
            return
        if fault is Fault.SLOW:
            time.sleep(SLOW)
        status, headers, body = self._ask(data)
        if fault is Fault.LATE:
            self._refuse(Fault.BROKEN)
        elif fault in (Fault.SILENT, Fault.HANGING):
            if fault is Fault.HANGING:
                time.sleep(HANGING)
            self.close_connection = True
        else:
            cut = fault is Fault.CUT and self.command == "GET" and len(body) > 1
            self._answer(status, headers, body, cut=cut)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

    def _ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """What the S3 behind says."""
        connection = http.client.HTTPConnection(HOST, self.server.s3.port, timeout=60)
        try:
            connection.request(self.command, self.path, data, dict(self.headers))
            told = connection.getresponse()
            body = told.read()
            headers = {name: text for name, text in told.getheaders() if name.lower() not in HOP}
            headers["Content-Length"] = told.getheader("Content-Length") or str(len(body))
            return told.status, headers, body
        finally:
            connection.close()

    def _refuse(self, fault: Fault) -> None:
        status, code = fault.value.split()
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
        self._answer(int(status), headers, body)

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
