"""Bodies come whole, in time, and in the memory there is for them; or it is said why not."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent import socket
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.unreader import SocketUnreader

from errors import BadBody, Overloaded
from web.bodies import SMALL, Memory, WholeBody


class Client:
    """Who sends a body, and what arrives of it."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.memory = Memory(4 * SMALL)

    def announces(self, length: int) -> WholeBody:
        reader = LengthReader(SocketUnreader(self.ours), length)
        return WholeBody(reader, self.ours, self.memory)

    def sends(self, data: bytes) -> None:
        gevent.spawn(self.theirs.sendall, data)

    def chunked(self, data: bytes) -> WholeBody:
        self.sends(data)
        reader: Any = ChunkedReader(SimpleNamespace(), SocketUnreader(self.ours))
        return WholeBody(reader, self.ours, self.memory)


@pytest.fixture
def client() -> Iterator[Client]:
    one = Client()
    yield one
    one.ours.close()
    one.theirs.close()


def test_a_body_comes_whole(client: Client) -> None:
    body = client.announces(3 * SMALL)
    body.within(30)
    client.sends(bytes(range(256)) * (3 * SMALL // 256))
    assert bytes(body.whole() or b"") == bytes(range(256)) * (3 * SMALL // 256)
    assert (body.unread, body.failed) == (0, False)


def test_a_client_that_does_not_send_is_waited_for_as_long_as_its_request_may_take(
    client: Client,
) -> None:
    body = client.announces(10)
    body.within(0.05)
    client.sends(b"12345")
    with pytest.raises(BadBody, match="in time"):
        body.whole()
    assert body.failed


def test_so_is_one_that_sends_in_chunks(client: Client) -> None:
    body = client.chunked(b"5\r\n12345\r\n")
    body.within(0.05)
    with pytest.raises(BadBody, match="in time"):
        body.read()
    assert body.failed


def test_a_client_that_goes_away_is_no_mistake_of_ours(client: Client) -> None:
    ours, theirs = _connected()
    body = WholeBody(LengthReader(SocketUnreader(ours), 10), ours, client.memory)
    theirs.sendall(b"12345")
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with ours, pytest.raises(BadBody):
        body.whole()
    assert body.failed


def _connected() -> tuple[Any, Any]:
    """By TCP, which can be reset."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        theirs = socket.create_connection(listener.getsockname())
        return listener.accept()[0], theirs


@pytest.mark.parametrize("sent", [b"five\r\n", b"5\r\n12345XX0\r\n\r\n", b"0\r\na: b\n"])
def test_what_is_no_body_is_refused(client: Client, sent: bytes) -> None:
    body = client.chunked(sent)
    with pytest.raises(BadBody):
        body.read()
    assert body.failed


def test_bodies_take_the_memory_there_is_and_give_it_back(client: Client) -> None:
    first, second = client.announces(3 * SMALL), client.announces(2 * SMALL)
    client.sends(bytes(5 * SMALL))
    assert first.whole()
    with pytest.raises(Overloaded):
        second.whole()
    # Nothing of it was read.
    assert second.unread == 2 * SMALL
    first.release()
    first.release()
    assert second.whole()


def test_small_bodies_are_not_counted_and_a_large_one_that_is_alone_is_let_in(
    client: Client,
) -> None:
    client.sends(bytes(6 * SMALL))
    large = client.announces(5 * SMALL)
    assert large.whole()
    assert client.announces(SMALL).whole()


def test_a_body_without_a_length_is_counted_as_it_comes(client: Client) -> None:
    client.memory.take(3 * SMALL)
    chunk = b"%x\r\n%s\r\n" % (SMALL, bytes(SMALL))
    body = client.chunked(chunk * 3)
    body.within(30)
    assert body.read(SMALL)
    with pytest.raises(Overloaded):
        body.read(SMALL)
    assert body.unread > SMALL
