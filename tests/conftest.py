"""What tests share: one embedded stack per test process, and fresh databases on it.

Everything is real unless a test says `fake`. Servers are made when the first test asks for them.
With TIDEGATE_TEST_BROKER=rabbitmq the stacks have RabbitMQ as message broker, not Redis.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import hypothesis
import pytest
import sqlalchemy as sa

import config
from config import Settings
from ops.embedded import Stack, rabbitmq
from storage.__main__ import upgrade
from storage.backlog import Backlog
from storage.chunks import Chunks
from storage.database import Database
from storage.files import Files
from storage.jobs import Jobs
from storage.keys import Keys
from storage.records import Records

# How long an example takes says something of the machine alone.
hypothesis.settings.register_profile("tidegate", deadline=None)
hypothesis.settings.load_profile("tidegate")

BROKER = os.environ.get("TIDEGATE_TEST_BROKER") or "redis"
# For every stack there is, those that tests start by themselves among them.
os.environ["TIDEGATE_BROKER"] = BROKER


NOT_INSTALLED = "RabbitMQ is not installed: apt-get install rabbitmq-server"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Leave out what needs the chosen broker where that is not there."""
    if BROKER == "rabbitmq" and not rabbitmq.installed():
        if os.environ.get("CI"):
            raise pytest.UsageError(f"{NOT_INSTALLED}, as .ci/run does")
        unit = Path(__file__).with_name("unit")
        for item in items:
            if unit not in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NOT_INSTALLED))


@pytest.fixture(scope="session")
def rabbitmq_installed() -> None:
    """Skips, or fails where everything is to be tested, if there is no RabbitMQ."""
    if not rabbitmq.installed():
        assert not os.environ.get("CI"), f"{NOT_INSTALLED}, as .ci/run does"
        pytest.skip(NOT_INSTALLED)


def settings_of(stack: Stack) -> Settings:
    """The settings of the product's processes in a stack."""
    names = {f"TIDEGATE_{name.upper()}": name for name in Settings.__dataclass_fields__}
    return config.load(**{names[key]: value for key, value in stack.env.items() if key in names})


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Postgres, Redis, and the message broker where that is another one."""
    # Nobody's bucket: what tests store is for tests to collect.
    environ = {name: text for name, text in os.environ.items() if name != "TIDEGATE_OBJECTS_URL"}
    with Stack(tmp_path_factory.mktemp("stack") / "var", environ=environ) as stack:
        stack.open()
        stack.start(only={"postgres", "redis", "epmd", "rabbitmq"} & stack.processes.keys())
        yield stack


@pytest.fixture(scope="session")
def stack(stores: Stack) -> Stack:
    """Everything `make up` starts."""
    stores.start()
    return stores


@pytest.fixture(scope="session")
def triton_address(stores: Stack) -> str:
    """A real Triton's gRPC address."""
    stores.start(only=("triton",))
    return stores.env["TIDEGATE_TRITON_URL"]


@pytest.fixture(scope="session")
def stack_settings(stack: Stack) -> Settings:
    """The settings of the running stack."""
    return settings_of(stack)


@pytest.fixture(scope="module")
def settings(stores: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a deployment of this module's own: a fresh database, a namespace in Redis."""
    shared = settings_of(stores)
    name = f"test_{secrets.token_hex(6)}"
    admin = sa.create_engine(shared.database_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    url = sa.make_url(shared.database_url).set(database=name)
    own = replace(
        shared,
        database_url=url.render_as_string(hide_password=False),
        namespace=name,
        objects_url=tmp_path_factory.mktemp("objects").as_uri(),
    )
    upgrade(own.database_url)
    yield own
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@dataclass(frozen=True)
class Ledger:
    """The parts of the ledger on one database, with a tenant of the test's own."""

    database: Database
    jobs: Jobs
    chunks: Chunks
    backlog: Backlog
    files: Files
    records: Records
    keys: Keys
    tenant: UUID
    group: str

    def sql(self, text: str, **values: object) -> None:
        with self.database.transaction() as connection:
            connection.execute(sa.text(text), values)


@pytest.fixture(scope="module")
def database(settings: Settings) -> Iterator[Database]:
    made = Database(settings.database_url)
    yield made
    made.close()


@pytest.fixture
def ledger(settings: Settings, database: Database) -> Ledger:
    """A ledger with a new tenant and a new group: tests don't see each other's work."""
    keys = Keys(database, settings.secret)
    tenant = keys.tenant_of(keys.create(secrets.token_hex(4)))
    return Ledger(
        database=database,
        jobs=Jobs(database),
        chunks=Chunks(database, lease=30, max_attempts=3),
        backlog=Backlog(database, max_attempts=3, credit=4096, hint_timeout=10),
        files=Files(database),
        records=Records(database),
        keys=keys,
        tenant=tenant,
        group=secrets.token_hex(4),
    )


class S3Server:
    """An S3 in this process, which can go away and come back with what it holds."""

    def __init__(self) -> None:
        # Loaded where it is used: it takes seconds.
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._made = ThreadedMotoServer
        self._port = 0
        self.start()

    def start(self) -> None:
        self._server = self._made("127.0.0.1", self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    def stop(self) -> None:
        listening: Any = self._server._server
        self._server.stop()
        listening.server_close()

    def url(self) -> str:
        """An objects URL, for a bucket of its own."""
        name = f"test-{secrets.token_hex(6)}"
        return f"s3://access:s%2Fcret@127.0.0.1:{self._port}/{name}?secure=false"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """For those who leave it as it is."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]
