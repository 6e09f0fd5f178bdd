"""The running stack as its clients see it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest
import redis

from config import Settings
from ops.embedded import Stack
from storage.database import Database
from storage.keys import Keys
from tests.e2e.helpers import Http, Witness

NewTenant = Callable[[], Http]


@pytest.fixture(scope="session")
def gateway(stack: Stack) -> Http:
    """The gateway, for the tenant `default`."""
    return Http.of(stack)


@pytest.fixture(scope="session")
def triton(stack: Stack) -> Http:
    """The Triton behind the gateway, directly."""
    return Http(stack.env["TIDEGATE_TRITON_HTTP_URL"])


@pytest.fixture(scope="session")
def redis_client(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.env["TIDEGATE_REDIS_URL"], socket_timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def witness(triton: Http, redis_client: redis.Redis) -> Witness:
    return Witness(triton, redis_client)


@pytest.fixture(scope="session")
def new_tenant(stack: Stack, stack_settings: Settings) -> Iterator[NewTenant]:
    """Makes a tenant, and gives the gateway as that tenant sees it."""
    database = Database(stack_settings.database_url, pool_size=1)
    keys = Keys(database, stack_settings.secret)
    yield lambda: Http.keyed(stack.env["TIDEGATE_URL"], keys.create(secrets.token_hex(6)))
    database.close()


@pytest.fixture(scope="module")
def mine(new_tenant: NewTenant) -> Http:
    """The gateway for a tenant of this module's own: its lists hold this module's work only."""
    return new_tenant()


@pytest.fixture(scope="module")
def stranger(new_tenant: NewTenant) -> Http:
    """The gateway for somebody else."""
    return new_tenant()
