"""Errors cross the queue whole, and every one of them has a meaning in HTTP."""

from __future__ import annotations

import pickle

import pytest

import errors
from errors import BY_CODE, TidegateError, from_wire
from web.error_handlers import STATUS


@pytest.mark.parametrize("cls", BY_CODE.values(), ids=lambda cls: cls.code)
def test_an_error_survives_the_wire(cls: type[TidegateError]) -> None:
    error = cls("why", param="image", retry_after=2.5)
    back = from_wire(error.to_wire())
    assert type(back) is cls
    assert (back.message, back.param, back.retry_after) == ("why", "image", 2.5)


def test_an_error_survives_pickling() -> None:
    back = pickle.loads(pickle.dumps(errors.ModelNotReady("why", retry_after=1)))
    assert (type(back), back.message, back.retry_after) == (errors.ModelNotReady, "why", 1)


def test_an_unknown_code_comes_back_as_the_root() -> None:
    assert type(from_wire({"code": "from_the_future", "message": "?"})) is TidegateError


def test_codes_are_unique() -> None:
    def tree(cls: type[TidegateError]) -> list[type[TidegateError]]:
        return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]

    ours = [cls for cls in tree(TidegateError) if cls.__module__ == "errors"]
    assert len(BY_CODE) >= len(ours)
    assert {BY_CODE[cls.code] for cls in ours} == set(ours)


def test_every_error_has_a_status() -> None:
    assert {cls for cls in BY_CODE.values() if cls.__module__ == "errors"} <= set(STATUS)
