"""`celery -A workers` finds the app here. Made when asked for: importing needs no settings."""

from __future__ import annotations

import functools

from celery import Celery

import config
from workers.app import build_app


@functools.cache
def _app() -> Celery:
    return build_app(config.settings())


def __getattr__(name: str) -> Celery:
    if name == "app":
        return _app()
    raise AttributeError(name)
