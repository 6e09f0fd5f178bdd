"""A gateway that dies where a test says so: `gunicorn -c web/gunicorn.py tests.e2e.dying:app`.

A file in the folder DYING names the point: what it does not come to do any more. The process that
comes there takes the file away and is killed; gunicorn's master starts the next one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from flask import Response

import config
from errors import KeyReused, Unavailable
from storage.backlog import Backlog
from storage.database import Database
from storage.idempotency import Once
from storage.jobs import Accepted, Jobs
from storage.work import NewBatch, NewJob
from tasks.bootstrap import build_services
from tasks.pump import Pump
from web.app import create_app


def die(point: str) -> None:
    try:
        (Path(os.environ["DYING"]) / point).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class DyingJobs(Jobs):
    def submit(
        self, jobs: Sequence[NewJob], keys: Mapping[UUID, Once] | None = None
    ) -> list[Accepted | KeyReused | Unavailable]:
        die("commit")
        return Jobs.submit(self, jobs, keys)

    def submit_batch(self, job: NewJob, batch: NewBatch, once: Once | None = None) -> UUID:
        die("commit")
        return Jobs.submit_batch(self, job, batch, once)


class DyingPump(Pump):
    def kick(self, group: str) -> None:
        die("publish")
        super().kick(group)


def die_unheard(response: Response) -> Response:
    die("answer")
    return response


database = Database(config.settings().database_url)
app = create_app(
    services=build_services(
        config.settings(),
        database=database,
        jobs=DyingJobs(database),
        pump=DyingPump(Backlog(database)),
    )
)
app.after_request(die_unheard)
