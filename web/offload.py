"""Work that would hold up every other request: files and compression, off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import gevent
from gevent import monkey

P = ParamSpec("P")
T = TypeVar("T")


def offload(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`run(…)` in a real thread, where threads have been replaced by greenlets; else right here.
    What it calls must not touch anything that belongs to the event loop."""
    if not monkey.is_module_patched("threading"):
        return run(*args, **kwargs)
    result: T = gevent.get_hub().threadpool.apply(run, args, kwargs)
    return result
