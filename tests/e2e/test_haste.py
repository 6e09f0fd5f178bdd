"""The stack's own sweeper releases less batch while realtime messages wait, and then all of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from uuid import UUID

import pytest
import sqlalchemy as sa
import uuid_utils.compat as uuids

from config import Settings
from ops.embedded import Stack
from storage.backlog import HINT_CHUNKS
from storage.work import NewJob
from tasks import haste
from tasks.bootstrap import Services, build_services
from tests.e2e.helpers import until

pytestmark = pytest.mark.stack

JOBS = 3 * HINT_CHUNKS
LONG = 60


@pytest.fixture(scope="module")
def services(stack: Stack, stack_settings: Settings) -> Iterator[Services]:
    """To submit with; what is released, the stack's processes release."""
    made = build_services(stack_settings, pool_size=2)
    yield made
    made.close()


def released(services: Services, group: str) -> int:
    """Chunks of a group whose hints have gone out."""
    with services.database.transaction() as connection:
        told = connection.execute(
            sa.text("SELECT count(*) FROM chunks WHERE group_name = :group AND hints > 0"),
            {"group": group},
        )
        return int(told.scalar_one())


def test_while_messages_wait_the_stack_releases_a_part_and_then_everything(
    services: Services,
) -> None:
    tenant = services.keys.tenant_of(services.keys.create(secrets.token_hex(4)))
    name = secrets.token_hex(4)
    # No worker of the stack reads these; and a sweep gets to the marker last.
    group, marker = f"a-{name}", f"z-{name}"

    def submit(group: str, count: int) -> list[UUID]:
        jobs = [
            NewJob(uuids.uuid7(), tenant, group, "identity", "", 3600.0, input=b"never read")
            for _ in range(count)
        ]
        services.jobs.submit(jobs)
        return [job.id for job in jobs]

    services.state.present(group, "somebody", LONG)
    services.state.hurry(group, LONG)
    jobs = submit(group, JOBS)
    part = until(lambda: released(services, group), 30)
    jobs += submit(marker, 1)
    until(lambda: released(services, marker), 30)
    assert released(services, group) == part == haste.CHUNKS * HINT_CHUNKS

    services.state.hurry(group, 0.001)
    until(lambda: released(services, group), 30, lambda count: count == JOBS)
    for job in jobs:
        services.jobs.cancel(tenant, job)
