"""What the fake Triton can be told to do. What it has in common with the real one: contracts."""

from __future__ import annotations

import time

import grpc
import pytest

from errors import ModelFailed, ModelNotReady
from inference.client import TritonServer
from inference.deadline import Deadline
from inference.fake import Delay, Fail, FakeTriton
from tests.unit.inference.strategies import identity, ints

GOOD = identity(ints([[1, 2], [3, 4]]))


def soon() -> Deadline:
    return Deadline.after(10.0)


def test_a_script_is_played_once_and_in_order() -> None:
    with FakeTriton() as fake:
        server = TritonServer(fake.address, 1 << 20)
        fake.script("identity", [Fail(grpc.StatusCode.INTERNAL, "first"), Delay(0.1)])
        with pytest.raises(ModelFailed, match="first"):
            server.infer(GOOD, soon())
        started = time.monotonic()
        server.infer(GOOD, soon())
        assert time.monotonic() - started >= 0.1
        server.infer(GOOD, soon())
        counts = fake.counts("identity")
        assert (counts.executed, counts.rows, counts.failed) == (2, 4, 1)
        server.close()


def test_a_model_can_go_and_come_back() -> None:
    with FakeTriton() as fake:
        server = TritonServer(fake.address, 1 << 20)
        fake.unload("identity")
        assert not server.ready(soon(), "identity")
        assert not server.ready(soon())
        assert server.live(soon())
        assert {
            "name": "identity",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "unloaded",
        } in (server.repository_index(soon()))
        assert [one["name"] for one in server.repository_index(soon(), ready=True)] == ["digits"]
        with pytest.raises(ModelNotReady):
            server.infer(GOOD, soon())
        fake.load("identity")
        server.infer(GOOD, soon())
        server.close()


def test_it_comes_back_at_the_same_address_and_stopping_twice_is_stopping_once() -> None:
    fake = FakeTriton()
    address = fake.start()
    fake.restart()
    assert fake.address == address
    fake.stop()
    fake.stop()
