"""One POST to a host that a tenant named, within one deadline for all of it.

Plain `http.client`, since what matters is what it leaves out: no redirects, no proxies from the
environment, no retries, no pool, and the address it connects to is ours to choose.
"""

from __future__ import annotations

import http.client
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from errors import BadRequest, Forbidden
from tasks import egress
from tasks.egress import Address, Target

EXCERPT = 4096
"""Bytes of an answer that are read at all."""
ADDRESSES = 4
"""Of one host, that are tried."""

Resolve = Callable[[str, int], list[str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, or why there is none."""

    status: int | None = None
    error: str | None = None
    body: str | None = None
    """How it begins."""
    retry_after: str | None = None
    date: str | None = None


def lookup(host: str, port: int) -> list[str]:
    """The host's addresses, from the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@cache
def trust() -> ssl.SSLContext:
    """The system's certificate authorities."""
    return ssl.create_default_context()


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    timeout: float,
    insecure: bool = False,
    resolve: Resolve = lookup,
    context: Callable[[], ssl.SSLContext] = trust,
) -> Answer:
    """Never raises for what the other side does; `insecure` lets http and private hosts pass."""
    deadline = time.monotonic() + timeout
    try:
        target = egress.parse(url, insecure=insecure)
        # All of them are judged, a few are tried.
        addresses = egress.permitted(_resolved(target, resolve, deadline), insecure=insecure)
        sock = _connected(target, addresses[:ADDRESSES], deadline, context)
    except (BadRequest, Forbidden) as error:
        return Answer(error=f"refused: {error.message}")
    except (OSError, UnicodeError) as error:
        return Answer(error=_words(error, timeout))
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = sock
    try:
        connection.request("POST", target.path, body, {"Host": target.authority, **headers})
        with connection.getresponse() as response:
            return Answer(
                status=response.status,
                body=_excerpt(response),
                retry_after=response.headers.get("Retry-After"),
                date=response.headers.get("Date"),
            )
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(error=_words(error, timeout))
    finally:
        connection.close()
        sock.close()


def _resolved(target: Target, resolve: Resolve, deadline: float) -> list[str]:
    """Resolvers know no deadline: a thread waits for this one, and is left behind if need be."""
    answer: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put(resolve(target.host, target.port))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    try:
        found = answer.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "the host has no address")
    return found


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Hurried:
    """A socket whose every read ends by the deadline: a byte a second is no way to go on."""

    deadline: float

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.deadline))  # type: ignore[attr-defined]
        received: int = super().recv_into(*args, **kwargs)  # type: ignore[misc]
        return received


class _Plain(_Hurried, socket.socket):
    pass


class _Tls(_Hurried, ssl.SSLSocket):
    pass


def _connected(
    target: Target,
    addresses: list[Address],
    deadline: float,
    context: Callable[[], ssl.SSLContext],
) -> socket.socket:
    """A connection to the first of these addresses that takes one, encrypted where it is to be."""
    for place, address in enumerate(addresses):
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = _Plain(family, socket.SOCK_STREAM)
        try:
            # An address that swallows everything leaves the others their share of the time.
            sock.settimeout(_left(deadline) / (len(addresses) - place))
            sock.connect((str(address), target.port))
            sock.settimeout(_left(deadline))
            sock.deadline = deadline
            return _encrypted(sock, target, deadline, context()) if target.secure else sock
        except ssl.SSLError:
            sock.close()
            raise
        except OSError:
            sock.close()
            if place == len(addresses) - 1:
                raise
    raise AssertionError("no address")


def _encrypted(
    sock: socket.socket, target: Target, deadline: float, context: ssl.SSLContext
) -> socket.socket:
    """TLS with the certificate of the name, whatever address it was found at."""
    context.sslsocket_class = _Tls
    wrapped = context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
    assert isinstance(wrapped, _Tls)
    wrapped.deadline = deadline
    try:
        wrapped.settimeout(_left(deadline))
        wrapped.do_handshake()
    except BaseException:
        wrapped.close()
        raise
    return wrapped


def _excerpt(response: http.client.HTTPResponse) -> str:
    """The status is known: what goes wrong while its body is read changes nothing."""
    data = b""
    try:
        while len(data) < EXCERPT and (block := response.read1(EXCERPT - len(data))):
            data += block
    except (OSError, http.client.HTTPException, ValueError):
        pass
    return data.decode(errors="replace").replace("\0", "\ufffd")


def _words(error: Exception, timeout: float) -> str:
    """What went wrong, in words that name nothing of ours."""
    match error:
        case TimeoutError():
            return f"no answer within {timeout:g} s"
        case ssl.SSLCertVerificationError():
            return f"TLS: the certificate is not good: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS: {error.reason or 'failed'}"
        case socket.gaierror():
            return "the host's name could not be resolved"
        case ConnectionRefusedError():
            return "the connection was refused"
        case http.client.HTTPException():
            return f"the answer is no HTTP: {type(error).__name__}"
        case OSError():
            return f"the connection failed: {error.strerror or type(error).__name__}"
        case _:
            return f"failed: {type(error).__name__}"
