"""One POST, to real servers on loopback: what counts as an answer, and what is cut off."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tasks import outbound
from tasks.outbound import EXCERPT, Answer
from tests.receiver import Receiver, Say, receiving

PATIENT = 10.0
SHORT = 0.5


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def post(url: str, timeout: float = PATIENT, **options: object) -> Answer:
    return outbound.post(
        url,
        b'{"a":1}',
        {"webhook-id": "msg_1", "Content-Type": "application/json"},
        timeout=timeout,
        **({"insecure": True} | options),  # type: ignore[arg-type]
    )


def to(*addresses: str) -> Callable[[str, int], list[str]]:
    """A resolver that knows one answer."""
    return lambda _host, _port: list(addresses)


@contextmanager
def talking(*speech: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that says these words to whoever connects, with pauses, and leaves the line open;
    its URL."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve() -> None:
            kept = []
            while not done.is_set():
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    continue
                kept.append(line)
                for word in speech:
                    try:
                        line.sendall(word)
                    except OSError:
                        break
                    if done.wait(pause):
                        break
            for line in kept:
                line.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            done.set()
            thread.join()


def test_the_request_arrives_as_it_was_given(receiver: Receiver) -> None:
    receiver.answer = lambda _: Say(202, {"Retry-After": "7"}, "só\0".encode())

    answer = post(f"{receiver.url}?tenant=a%20b")

    assert (answer.status, answer.error, answer.retry_after) == (202, None, "7")
    assert answer.body == "só\ufffd"
    assert answer.date is not None
    (request,) = receiver.received
    assert (request.path, request.body) == ("/hook?tenant=a%20b", b'{"a":1}')
    assert request.headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["webhook-id"] == "msg_1"


def test_of_a_long_answer_the_beginning_is_read(receiver: Receiver) -> None:
    receiver.answer = lambda _: Say(500, body=b"x" * 10**6)
    answer = post(receiver.url)
    assert (answer.status, answer.body) == (500, "x" * EXCERPT)


def test_a_redirect_is_an_answer_and_not_followed(receiver: Receiver) -> None:
    with receiving() as other:
        receiver.answer = lambda _: Say(307, {"Location": other.url})
        assert post(receiver.url).status == 307
        assert other.connections == 0


def test_proxies_of_the_environment_are_not_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert post(receiver.url).status == 200
        assert proxy.connections == 0


# Time


@pytest.mark.parametrize(
    "speech",
    [
        (),
        [b"H", b"T", b"T", b"P", *[b"x"] * 100],
        [b"HTTP/1.1 200 OK\r\n", *[b"X-Header: 1\r\n"] * 90],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 90,
    ],
    ids=["silence", "a letter at a time", "a header at a time", "on and on"],
)
def test_an_answer_that_does_not_come_in_time_is_cut_off(speech: list[bytes]) -> None:
    with talking(*speech, pause=0.1) as url:
        started = time.monotonic()
        answer = post(url, timeout=SHORT)
        took = time.monotonic() - started
    assert (answer.status, answer.error) == (None, "no answer within 0.5 s")
    assert SHORT <= took < 4


def test_a_body_that_does_not_come_in_time_leaves_the_status() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"
    with talking(head, *[b"x"] * 100, pause=0.1) as url:
        answer = post(url, timeout=SHORT)
    assert answer.status == 200
    assert set(answer.body or "") <= {"x"}


def test_a_resolver_that_hangs_is_left_behind() -> None:
    forever = threading.Event()

    def resolve(_host: str, _port: int) -> list[str]:
        forever.wait(60)
        return ["127.0.0.1"]

    started = time.monotonic()
    answer = post("http://hooks.example.com/", timeout=SHORT, resolve=resolve)
    forever.set()
    assert answer.error == "no answer within 0.5 s"
    assert time.monotonic() - started < 4


# What is no answer


def test_who_does_not_listen_and_who_speaks_no_http_is_told_in_words(receiver: Receiver) -> None:
    receiver.stop()
    assert post(receiver.url).error == "the connection was refused"
    with talking(b"220 mail.example.com ESMTP\r\n") as url:
        assert post(url).error == "the answer is no HTTP: BadStatusLine"

    def unknown(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "nobody")

    for resolve in (unknown, to()):
        answer = post("http://hooks.example.com/", resolve=resolve)
        assert answer.error == "the host's name could not be resolved"


# The guard


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["127.0.0.1", *["8.8.8.8"] * 9],
        [*["8.8.8.8"] * 9, "127.0.0.1"],
    ],
)
def test_a_name_that_leads_inside_is_not_called(receiver: Receiver, addresses: list[str]) -> None:
    answer = post(
        f"https://hooks.example.com:{receiver.port}/", insecure=False, resolve=to(*addresses)
    )
    assert answer.error == "refused: the host's address is not public"
    assert receiver.connections == 0


def test_a_url_that_was_allowed_once_is_checked_again(receiver: Receiver) -> None:
    assert (post(receiver.url, insecure=False).error or "").startswith("refused: url")
    assert receiver.connections == 0


def test_a_name_that_changes_its_mind_is_called_at_the_address_that_was_checked(
    receiver: Receiver,
) -> None:
    asked = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    assert post(f"http://hooks.example.com:{receiver.port}/", resolve=resolve).status == 200
    assert asked == ["hooks.example.com"]


def test_an_address_that_does_not_answer_leaves_room_for_the_next(receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.2", 0)):
        pass  # 127.0.0.2 refuses
    answer = post(
        f"http://hooks.example.com:{receiver.port}/", resolve=to("127.0.0.2", "127.0.0.1")
    )
    assert answer.status == 200


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[x509.GeneralName], Path]:
    """Makes a file of a key and a certificate for a name; each is its own authority."""
    folder = tmp_path_factory.mktemp("tls")

    def make(name: x509.GeneralName) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(who)
            .issuer_name(who)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        path = folder / f"{name.value}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        return path

    return make


@contextmanager
def encrypted(pem: Path) -> Iterator[tuple[int, list[str | None]]]:
    """A TLS server with this certificate: its port, and the names it was asked for."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve() -> None:
            while not done.is_set():
                try:
                    plain, _ = server.accept()
                except TimeoutError:
                    continue
                plain.settimeout(5)
                with plain:
                    try:
                        with context.wrap_socket(plain, server_side=True) as line:
                            while not line.recv(65536).endswith(b'{"a":1}'):
                                pass
                            line.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                    except OSError:
                        pass  # the client didn't like the certificate

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1], names
        finally:
            done.set()
            thread.join()


def test_tls_asks_for_the_name_and_believes_only_its_certificate(
    authority: Callable[[x509.GeneralName], Path],
) -> None:
    pem = authority(x509.DNSName("hooks.example.com"))
    trusting = ssl.create_default_context(cafile=pem)
    with encrypted(pem) as (port, names):

        def call(host: str, context: ssl.SSLContext) -> Answer:
            return post(f"https://{host}:{port}/", resolve=to("127.0.0.1"), context=lambda: context)

        assert call("hooks.example.com", trusting) == Answer(status=204, body="")
        assert names == ["hooks.example.com"]
        other = call("other.example.com", trusting).error or ""
        assert other.startswith("TLS: the certificate is not good")
        stranger = call("hooks.example.com", ssl.create_default_context()).error or ""
        assert stranger.startswith("TLS: the certificate is not good")


def test_tls_to_an_address_wants_the_address_in_the_certificate(
    authority: Callable[[x509.GeneralName], Path],
) -> None:
    pem = authority(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    with encrypted(pem) as (port, _):
        answer = post(
            f"https://127.0.0.1:{port}/", context=lambda: ssl.create_default_context(cafile=pem)
        )
    assert answer.status == 204


def test_a_server_that_never_finishes_its_handshake_is_cut_off() -> None:
    with talking() as url:
        answer = post(url.replace("http:", "https:"), timeout=SHORT)
    assert answer.error == "no answer within 0.5 s"
