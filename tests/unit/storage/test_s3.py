"""What an S3 may do wrong, from a server that does so when told. What it does right is in the
contract."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from config import Bucket, parse_objects
from errors import DeadlineExceeded, Gone, Unavailable
from storage.s3 import PART, S3Store
from storage.time_limit import within
from tests.conftest import S3Server

DATA = b"0123456789" * 1000


class Request(BaseHTTPRequestHandler):
    """One request. Unless the test says otherwise the bucket is there, a put is taken and a get
    answered with `DATA`; connections are kept, as real servers do."""

    protocol_version = "HTTP/1.1"
    server: Server

    def _answer(self) -> None:
        self.data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(f"{self.command} {self.path}")
        if not self.server.on(self):
            self.reply(200, DATA if self.command == "GET" else b"")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def reply(self, status: int, body: bytes = b"", **headers: str) -> bool:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return True

    def refuse(self, status: int, code: str, **headers: str) -> bool:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        return self.reply(status, body, Content_Type="application/xml", **headers)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.on: Callable[[Request], bool] = lambda _: False
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"s3://key:secret@127.0.0.1:{self.server_port}/bucket?secure=false"

    def handle_error(self, *_: object) -> None:
        pass  # A client that leaves is what some tests are about.


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def bucket(url: str) -> Bucket:
    found = parse_objects(url)
    assert isinstance(found, Bucket)
    return found


@pytest.fixture
def store(server: Server) -> S3Store:
    return S3Store(bucket(server.url), connect_timeout=1, read_timeout=0.5)


def times(count: int, answer: Callable[[Request], bool]) -> Callable[[Request], bool]:
    """The answer to the first so many requests about objects."""
    left = [count]

    def on(request: Request) -> bool:
        if urlsplit(request.path).path.count("/") < 2 or not left[0]:
            return False
        left[0] -= 1
        return answer(request)

    return on


ALWAYS = 10**6


def test_a_get_cut_short_is_never_served_as_whole(store: S3Store, server: Server) -> None:
    def cut(request: Request) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", str(len(DATA)))
        request.end_headers()
        request.wfile.write(DATA[:-1])
        request.close_connection = True
        return True

    server.on = times(ALWAYS, cut)
    with pytest.raises(Unavailable):
        store.get("x")
    taken: list[bytes] = []
    with pytest.raises(Unavailable):
        taken.extend(store.stream("x"))
    server.on = times(0, cut)
    assert store.get("x") == DATA


def test_a_server_that_fell_silent_is_left_within_the_deadline(
    store: S3Store, server: Server
) -> None:
    def stall(request: Request) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", str(len(DATA)))
        request.end_headers()
        request.wfile.write(DATA[:-1])
        request.wfile.flush()
        time.sleep(5)
        request.close_connection = True
        return True

    server.on = times(ALWAYS, stall)
    with pytest.raises(Unavailable):
        store.get("x")


def test_a_server_that_never_answers_is_left_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"s3://key:secret@127.0.0.1:{listening.getsockname()[1]}/bucket?secure=false"
        store = S3Store(bucket(url), connect_timeout=0.2, read_timeout=0.2)
        began = time.monotonic()
        for ask in (store.ping, lambda: store.get("x"), lambda: store.put("x", b"1")):
            with pytest.raises(Unavailable):
                ask()
        assert time.monotonic() - began < 20


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = S3Store(bucket(f"s3://key:secret@127.0.0.1:{port}/bucket?secure=false"))
    for ask in (
        store.ping,
        lambda: store.get("x"),
        lambda: store.stream("x"),
        lambda: store.size("x"),
        lambda: store.put("x", b"1"),
        lambda: store.delete("x"),
        lambda: list(store.list()),
    ):
        with pytest.raises(Unavailable) as refused:
            ask()
        assert "secret" not in str(refused.value)


# Calls that have so much time, of a store whose own patience would last for a minute


HASTY = 0.4


@pytest.fixture
def patient(server: Server) -> S3Store:
    store = S3Store(bucket(server.url))
    store.size("x")  # Its bucket is there.
    server.seen.clear()
    return store


def trickle(request: Request, head: bytes = b"") -> bool:
    """A byte now and then, for as long as anybody listens."""
    request.wfile.write(head)
    while True:
        request.wfile.write(b" ")
        time.sleep(0.05)


def silent(_: Request) -> bool:
    time.sleep(5)
    return True


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
SLOW: dict[str, Callable[[Request], bool]] = {
    "silent": silent,
    "a slow head": lambda request: trickle(request, b"HTTP/1.1 200 OK\r\nX: "),
    "a slow body": lambda request: trickle(request, HEAD),
    "a slow error": lambda request: trickle(request, HEAD.replace(b"200", b"503")),
}


@pytest.mark.parametrize("answer", SLOW)
def test_what_is_slow_ends_with_its_time_and_is_not_asked_again(
    patient: S3Store, server: Server, answer: str
) -> None:
    server.on = times(ALWAYS, SLOW[answer])
    asks: list[Callable[[], object]] = [
        lambda: patient.get("x"),
        lambda: patient.put("x", b"1"),
        lambda: patient.delete("x"),
    ]
    if answer in ("silent", "a slow head"):
        # Its answer has no body that could be slow.
        asks.append(lambda: patient.size("x"))
    for ask in asks:
        server.seen.clear()
        with within(HASTY), pytest.raises(DeadlineExceeded):
            ask()
        assert len(server.seen) == 1
    server.on = lambda request: request.command == "GET" and SLOW[answer](request)
    with within(HASTY), pytest.raises(DeadlineExceeded):
        list(patient.list())


def test_a_server_that_takes_nothing_ends_with_its_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"s3://key:secret@127.0.0.1:{listening.getsockname()[1]}/bucket?secure=false"
        store = S3Store(bucket(url))
        store._made = True
        for ask in (lambda: store.put("x", bytes(PART)), lambda: store.get("x"), store.ping):
            with within(HASTY), pytest.raises(DeadlineExceeded):
                ask()


def test_a_sick_server_is_not_waited_for_longer_than_there_is_time(
    patient: S3Store, server: Server
) -> None:
    """The second try follows at once, the third after a pause that is longer than this."""
    server.on = times(ALWAYS, lambda request: request.refuse(503, "SlowDown"))
    with within(0.3), pytest.raises(DeadlineExceeded):
        patient.get("x")
    assert 1 <= len(server.seen) <= 2


def test_a_server_that_answers_before_the_time_is_over_is_believed(
    patient: S3Store, server: Server
) -> None:
    server.on = times(ALWAYS, lambda request: request.refuse(404, "NoSuchKey"))
    with within(30), pytest.raises(Gone):
        patient.get("x")
    server.on = times(ALWAYS, lambda request: request.refuse(403, "AccessDenied"))
    with within(30), pytest.raises(Unavailable, match="AccessDenied"):
        patient.get("x")


def test_nothing_is_asked_when_the_time_is_over(patient: S3Store, server: Server) -> None:
    with within(0), pytest.raises(DeadlineExceeded):
        patient.get("x")
    assert server.seen == []


def test_a_connection_forgets_the_time_of_who_had_it_before(
    patient: S3Store, server: Server
) -> None:
    with within(HASTY):
        assert patient.get("x") == DATA

    def slow(_: Request) -> bool:
        time.sleep(2 * HASTY)
        return False

    server.on = times(ALWAYS, slow)
    assert patient.get("x") == DATA
    assert patient.put("x", b"1") == 1


def test_a_stream_keeps_the_time_it_was_opened_with(patient: S3Store, server: Server) -> None:
    server.on = times(ALWAYS, SLOW["a slow body"])
    with within(HASTY):
        blocks = patient.stream("x")
    with pytest.raises(DeadlineExceeded):
        list(blocks)


def test_over_tls_it_is_the_same(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    store = S3Store(bucket(server.url.replace("secure=false", "secure=true")))
    with within(30):
        assert store.put("x", bytes(1 << 20)) == 1 << 20
        assert store.get("x") == DATA
    for answer in SLOW.values():
        server.on = times(ALWAYS, answer)
        with within(HASTY), pytest.raises(DeadlineExceeded):
            store.get("x")
    # Nor does a handshake that never ends take longer.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"s3://key:secret@127.0.0.1:{listening.getsockname()[1]}/bucket?secure=true"
        with within(HASTY), pytest.raises(DeadlineExceeded):
            S3Store(bucket(url)).get("x")


def certificate(folder: Path) -> Path:
    """A key of 127.0.0.1 and what it says about itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(key.private_bytes(pem, *plain) + made.public_bytes(pem))
    return path


def test_a_server_that_stumbles_is_asked_again(store: S3Store, server: Server) -> None:
    server.on = times(2, lambda request: request.refuse(503, "SlowDown"))
    assert store.get("x") == DATA
    server.on = times(2, lambda request: request.refuse(500, "InternalError"))
    assert store.put("x", b"1") == 1


def test_a_server_that_stays_sick_is_not_asked_for_ever_nor_as_late_as_it_likes(
    store: S3Store, server: Server
) -> None:
    server.on = times(ALWAYS, lambda request: request.refuse(503, "SlowDown", Retry_After="3600"))
    for ask in (lambda: store.get("x"), lambda: store.put("x", b"1")):
        server.seen.clear()
        with pytest.raises(Unavailable, match="SlowDown"):
            ask()
        assert 1 < sum("/bucket/x" in path for path in server.seen) < 5


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (403, "RequestTimeTooSkewed"),
        (403, "SignatureDoesNotMatch"),
        (404, "NoSuchBucket"),
        (409, "OperationAborted"),
        (501, "NotImplemented"),
    ],
)
def test_what_is_not_said_to_be_gone_is_not_gone(
    store: S3Store, server: Server, status: int, code: str
) -> None:
    """Else an answer would be lost for good to a clock that is wrong for an hour."""
    server.on = times(ALWAYS, lambda request: request.refuse(status, code))
    with pytest.raises(Unavailable, match=code):
        store.get("x")
    server.on = times(ALWAYS, lambda request: request.refuse(404, "NoSuchKey"))
    with pytest.raises(Gone):
        store.get("x")


@pytest.mark.parametrize("body", [b"<html>a proxy's page</html>", b"", b"\xff\xfe", b"<Error>"])
def test_an_answer_nobody_understands_is_unavailable(
    store: S3Store, server: Server, body: bytes
) -> None:
    for kind in ("text/html", "application/xml"):

        def babble(request: Request, kind: str = kind) -> bool:
            return request.reply(418, body, Content_Type=kind)

        server.on = times(ALWAYS, babble)
        with pytest.raises(Unavailable):
            store.get("x")


def test_a_server_that_ignores_ranges_is_not_believed(store: S3Store) -> None:
    with pytest.raises(Unavailable, match="range"):
        store.stream("x", 3, 8)


def test_a_long_stream_goes_in_parts_and_is_never_whole_in_memory(
    store: S3Store, server: Server
) -> None:
    lengths: list[int] = []
    produced = 0

    def take(request: Request) -> bool:
        if request.command == "POST" and request.path.endswith("?uploads="):
            return request.reply(200, b"<R><UploadId>u</UploadId></R>")
        if request.command == "POST":
            return request.reply(200, b"<R><ETag>e</ETag></R>")
        lengths.append(len(request.data))
        # What has been made by now is on its way, but for the part in hand.
        assert produced - sum(lengths) <= 1 << 20
        return request.reply(200)

    def produce() -> Iterator[bytes]:
        nonlocal produced
        for _ in range(20):
            produced += 1 << 20
            yield bytes(1 << 20)

    server.on = times(ALWAYS, take)
    assert store.put("x", produce()) == 20 << 20
    assert lengths == [PART, PART, (20 << 20) - 2 * PART]


def test_parts_that_are_not_put_together_after_all_are_no_object(
    store: S3Store, server: Server
) -> None:
    """S3 sends 200 before it knows, and the error in the body."""

    def take(request: Request) -> bool:
        if request.command == "POST" and request.path.endswith("?uploads="):
            return request.reply(200, b"<R><UploadId>u</UploadId></R>")
        if request.command == "POST":
            return request.reply(200, b"<Error><Code>InternalError</Code></Error>")
        return request.reply(200)

    server.on = times(ALWAYS, take)
    with pytest.raises(Unavailable):
        store.put("x", bytes(PART + 1))


def test_a_bucket_that_may_not_be_made_or_looked_for_is_used_all_the_same(
    store: S3Store, server: Server
) -> None:
    def guarded(request: Request) -> bool:
        if urlsplit(request.path).path.strip("/") == "bucket":
            return request.refuse(403, "AccessDenied")
        return False

    server.on = guarded
    assert store.get("x") == DATA
    assert not any(seen.startswith("PUT") for seen in server.seen)


@pytest.mark.parametrize("code", ["BucketAlreadyOwnedByYou", "BucketAlreadyExists"])
def test_a_bucket_somebody_else_made_first_is_used(
    store: S3Store, server: Server, code: str
) -> None:
    def raced(request: Request) -> bool:
        if urlsplit(request.path).path.strip("/") != "bucket":
            return False
        if request.command == "HEAD":
            return request.reply(404)
        return request.refuse(409, code)

    server.on = raced
    assert store.get("x") == DATA


def test_an_upload_that_nobody_will_end_is_aborted(s3: S3Server) -> None:
    where = bucket(s3.url())
    store = S3Store(where)
    store.put("x", b"1")
    client = store._client
    upload = client._create_multipart_upload(where.name, "a/b", {})
    client._upload_part(where.name, "a/b", b"half", None, upload, 1)
    assert store.clean(datetime.now(UTC)) == 1
    assert store.clean(datetime.now(UTC)) == 0
    assert [one.key for one in store.list()] == ["x"]


def test_an_upload_that_may_still_be_going_on_is_left_alone(store: S3Store, server: Server) -> None:
    """S3 says when an upload began, and not when it was last heard of."""
    now = datetime.now(UTC)
    begun = {"old": now - timedelta(hours=30), "alive": now - timedelta(hours=20)}

    def uploads(request: Request) -> bool:
        if request.command != "GET":
            return False
        listed = "".join(
            f"<Upload><Key>{key}</Key><UploadId>u</UploadId>"
            f"<Initiated>{moment:%Y-%m-%dT%H:%M:%S}.000Z</Initiated></Upload>"
            for key, moment in begun.items()
        )
        return request.reply(200, f"<R>{listed}</R>".encode(), Content_Type="application/xml")

    server.on = uploads
    assert store.clean(now - timedelta(hours=1)) == 1
    assert [seen for seen in server.seen if seen.startswith("DELETE")] == [
        "DELETE /bucket/old?uploadId=u"
    ]
    server.on = lambda request: request.refuse(501, "NotImplemented")
    assert store.clean(now) == 0


UNDER_GEVENT = """
import sys
from gevent import monkey; monkey.patch_all()
import gevent
from errors import DeadlineExceeded
from storage.objects import open_store
from storage.time_limit import within
from web.offload import guarded

store = guarded(open_store(sys.argv[1]))
ticks = 0

def tick():
    global ticks
    while True:
        ticks += 1
        gevent.sleep(0.01)

def use():
    store.put("x", b"1")
    assert store.get("x") == b"0123456789" * 1000
    assert b"".join(store.stream("x")) == b"0123456789" * 1000

def refused():
    folder = guarded(open_store(sys.argv[2]))
    folder.put("x", b"1")
    with within(0):
        try:
            folder.get("x")
        except DeadlineExceeded:
            return True

def hurry():
    with within(0.4):
        try:
            store.get("slow")
        except DeadlineExceeded:
            return True

clock = gevent.spawn(tick)
hurried = gevent.spawn(hurry)
for _ in range(3):
    users = [gevent.spawn(use) for _ in range(20)]
    gevent.joinall(users, timeout=30, raise_error=True)
    assert all(user.successful() for user in users)
assert hurried.get(timeout=30)
assert gevent.spawn(refused).get(timeout=30)
print(ticks)
"""


def test_under_gevent_many_use_it_at_once_and_nobody_else_waits(
    server: Server, root: Path, tmp_path: Path
) -> None:
    """On connections that are kept: where one crossed threads, gevent would refuse it."""

    def slow(request: Request) -> bool:
        if request.path.startswith("/bucket/slow"):
            return trickle(request, HEAD)
        time.sleep(0.1)
        return False

    server.on = slow
    done = subprocess.run(
        [sys.executable, "-c", UNDER_GEVENT, server.url, tmp_path.as_uri()],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
