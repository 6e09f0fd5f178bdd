"""An unmodified `openai` SDK manages webhooks, is told what ended, and verifies that it was us."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from openai.types import webhooks as shapes
from standardwebhooks import Webhook

from config import Settings
from ops.embedded import Stack
from storage.database import Database
from storage.keys import Keys
from tests.e2e.helpers import Http, batch_line, ended, ints, until, upload
from tests.e2e.test_batches import sdk
from tests.receiver import Received, Receiver, Say, receiving

pytestmark = pytest.mark.stack

PUBLIC = "https://hooks.example.com/tidegate"
ENDPOINTS = "/v1/webhook_endpoints"
JOB_EVENTS: Any = ["job.succeeded", "job.failed", "job.canceled", "job.expired"]
BATCH_EVENTS: Any = ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that may deliver to this machine."""
    var = tmp_path_factory.mktemp("webhooks") / "var"
    with Stack(var, environ=os.environ | {"TIDEGATE_WEBHOOK_INSECURE": "true"}) as stack:
        stack.start()
        yield stack


@pytest.fixture(scope="module")
def own_database(own: Stack) -> Iterator[Database]:
    made = Database(own.env["TIDEGATE_DATABASE_URL"], pool_size=1)
    yield made
    made.close()


@pytest.fixture
def server(own: Stack, own_database: Database) -> Http:
    """The gateway of that stack, for a tenant that has nothing yet."""
    keys = Keys(own_database, own.env["TIDEGATE_SECRET"])
    return Http.keyed(own.env["TIDEGATE_URL"], keys.create(os.urandom(6).hex()))


@pytest.fixture
def client(server: Http) -> Iterator[openai.OpenAI]:
    with sdk(server) as made:
        yield made


@pytest.fixture
def fresh(new_tenant: Callable[[], Http]) -> Http:
    """The gateway that delivers to public hosts only, for a tenant that has nothing yet."""
    return new_tenant()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def sql(database: Database, text: str, **values: object) -> None:
    with database.transaction() as connection:
        connection.execute(sa.text(text), values)


def job(server: Http) -> str:
    reply = server.post("/v1/jobs", {"model": "identity", "input": ints(1)})
    assert reply.status == 202, reply
    return str(reply.json()["id"])


def strict(value: Any) -> Any:
    """The SDK builds its objects without looking; this looks."""
    return type(value).model_validate(value.to_dict(), strict=True)


def log(server: Http, webhook: str, query: str = "") -> list[dict[str, Any]]:
    reply = server.get(f"{ENDPOINTS}/{webhook}/deliveries{query}")
    assert reply.status == 200, reply
    data: list[dict[str, Any]] = reply.json()["data"]
    return data


def logged(server: Http, webhook: str, state: str, count: int = 1) -> list[dict[str, Any]]:
    """An endpoint's deliveries, once so many are in this state."""
    return until(
        lambda: log(server, webhook, f"?state={state}"), 20, lambda found: len(found) == count
    )


# Managing


def test_endpoints_are_made_listed_changed_and_deleted(fresh: Http) -> None:
    with sdk(fresh) as client:
        names: Any = [*JOB_EVENTS, *BATCH_EVENTS]
        assert sorted(strict(client.webhooks.event_types.list()).data) == sorted(names)

        made = client.webhooks.create(name="mine", url=PUBLIC, event_types=names)
        assert strict(made).signing_secret.startswith("whsec_")
        assert (made.name, made.url, made.event_types) == ("mine", PUBLIC, names)
        assert made.signing_secret_hint is not None
        assert made.signing_secret_hint.startswith("whsec_...")
        assert made.updated_at == made.created_at
        found = strict(client.webhooks.retrieve(made.id))
        assert found.to_dict() == {
            key: value for key, value in made.to_dict().items() if key != "signing_secret"
        }
        assert made.signing_secret not in fresh.get(f"{ENDPOINTS}/{made.id}").body.decode()

        changed = strict(
            client.webhooks.update(made.id, name="yours", event_types=["batch.failed"])
        )
        assert (changed.name, changed.url, changed.event_types) == (
            "yours",
            PUBLIC,
            ["batch.failed"],
        )
        assert strict(client.webhooks.update(made.id)).to_dict() == changed.to_dict()

        rotated = strict(client.webhooks.rotate_secret(made.id))
        assert rotated.signing_secret != made.signing_secret
        assert rotated.signing_secret_hint != made.signing_secret_hint

        deleted = strict(client.webhooks.delete(made.id))
        assert (deleted.id, deleted.deleted) == (made.id, True)
        calls: list[Callable[[str], object]] = [
            client.webhooks.retrieve,
            client.webhooks.update,
            client.webhooks.rotate_secret,
            client.webhooks.delete,
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call(made.id)


def test_lists_are_paged_newest_first_and_there_are_twenty_at_most(fresh: Http) -> None:
    with sdk(fresh) as client:

        def create() -> str:
            return client.webhooks.create(name="n", url=PUBLIC, event_types=BATCH_EVENTS).id

        made = [create() for _ in range(20)]
        assert [one.id for one in client.webhooks.list(limit=7)] == made[::-1]
        assert [one.id for one in client.webhooks.list()] == made[::-1]
        with pytest.raises(openai.ConflictError, match="20"):
            create()


GOOD: dict[str, Any] = {"name": "n", "url": PUBLIC, "event_types": ["job.failed"]}
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no url": ("url", {"url": None}),
    "http": ("url", {"url": "http://hooks.example.com/"}),
    "loopback": ("url", {"url": "https://127.0.0.1/"}),
    "metadata": ("url", {"url": "https://169.254.169.254/latest"}),
    "an address as a number": ("url", {"url": "https://2130706433/"}),
    "an address in octal": ("url", {"url": "https://0177.0.0.1/"}),
    "an address in hex": ("url", {"url": "https://0x7f.1/"}),
    "a mapped address": ("url", {"url": "https://[::ffff:127.0.0.1]/"}),
    "credentials": ("url", {"url": "https://user:pass@hooks.example.com/"}),
    "a line break": ("url", {"url": "https://hooks.example.com/\r\nX: 1"}),
    "a NUL": ("url", {"url": "https://hooks.example.com/\0"}),
    "too long": ("url", {"url": "https://hooks.example.com/" + "a" * 2100}),
    "url that is no text": ("url", {"url": 1}),
    "empty name": ("name", {"name": ""}),
    "long name": ("name", {"name": "n" * 256}),
    "name with a NUL": ("name", {"name": "a\0b"}),
    "no events": ("event_types", {"event_types": []}),
    "another's event": ("event_types", {"event_types": ["response.completed"]}),
    "events that are no list": ("event_types", {"event_types": "job.failed"}),
}


def test_a_rotation_sent_again_under_its_key_rotates_once(fresh: Http) -> None:
    made = fresh.post(ENDPOINTS, GOOD).json()
    path = f"{ENDPOINTS}/{made['id']}/rotate_secret"
    first, again = (
        fresh.post(path, {"keep_old_secret_active_for_24_hours": True}, Idempotency_Key="once")
        for _ in range(2)
    )
    assert (first.status, again.status) == (200, 200)
    assert again.json() == first.json()
    assert first.json()["signing_secret"] != made["signing_secret"]
    assert [reply.headers["Idempotent-Replayed"] for reply in (first, again)] == [None, "true"]
    other = fresh.post(path, Idempotency_Key="once")
    assert (other.status, other.json()["error"]["param"]) == (422, "Idempotency-Key")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_endpoint_is_refused_by_the_name_of_its_field(mine: Http, case: str) -> None:
    field, changes = BAD[case]
    kept = mine.post(ENDPOINTS, GOOD).json()
    body = {name: value for name, value in (GOOD | changes).items() if value is not None}
    try:
        for path in (ENDPOINTS, f"{ENDPOINTS}/{kept['id']}"):
            if path != ENDPOINTS and case == "no url":
                continue
            reply = mine.post(path, body)
            assert reply.status == 400, reply
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["param"].split(".")[0]) == ("invalid_request_error", field)
        found = mine.get(f"{ENDPOINTS}/{kept['id']}").json()
        assert {key: found[key] for key in GOOD} == GOOD
        assert len(mine.get(ENDPOINTS).json()["data"]) == 1
    finally:
        mine("DELETE", f"{ENDPOINTS}/{kept['id']}")


def test_what_is_no_json_and_unknown_ids_and_filters_are_refused(mine: Http) -> None:
    made = mine.post(ENDPOINTS, GOOD).json()["id"]
    try:
        text = mine("POST", ENDPOINTS, b"{", {"Content-Type": "application/json"})
        assert text.status == 400
        form = mine(
            "POST", ENDPOINTS, b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert form.status == 415
        for path in (f"{ENDPOINTS}/we_none", f"{ENDPOINTS}/{made}x"):
            reply = mine.get(path)
            assert (reply.status, reply.json()["error"]["type"]) == (404, "not_found_error")
        for query in ("limit=0", "limit=x", "state=sent", "after=nobody"):
            reply = mine.get(f"{ENDPOINTS}/{made}/deliveries?{query}")
            assert (reply.status, reply.json()["error"]["param"]) == (400, query.split("=")[0])
        test = mine.post(f"{ENDPOINTS}/{made}/test", {"event_type": "response.completed"})
        assert (test.status, test.json()["error"]["param"]) == (400, "event_type")
        rotate = mine.post(
            f"{ENDPOINTS}/{made}/rotate_secret", {"keep_old_secret_active_for_24_hours": "perhaps"}
        )
        assert rotate.status == 400
        # As the SDK calls what has no body.
        empty = {"Content-Type": "application/json"}
        assert mine("POST", f"{ENDPOINTS}/{made}/rotate_secret", b"", empty).status == 200
    finally:
        assert mine("DELETE", f"{ENDPOINTS}/{made}", b"", {"Content-Type": "application/json"})


def test_without_a_key_there_is_nothing(mine: Http) -> None:
    nobody = Http(mine.url)
    for method, path in (
        ("GET", "/v1/webhook_event_types"),
        ("GET", ENDPOINTS),
        ("POST", ENDPOINTS),
        ("GET", f"{ENDPOINTS}/we_1/deliveries"),
    ):
        reply = nobody(method, path)
        assert (reply.status, reply.json()["error"]["type"]) == (401, "authentication_error")


# Delivering


def test_a_batch_and_a_job_are_told_of_and_the_sdk_verifies_it(
    server: Http, client: openai.OpenAI, receiver: Receiver
) -> None:
    endpoint = client.webhooks.create(
        name="all", url=receiver.url, event_types=[*BATCH_EVENTS, *JOB_EVENTS]
    )
    job_id = job(server)
    file = upload(server, batch_line("a", ints(1)), batch_line("b", ints(2)))
    batch = client.batches.create(
        input_file_id=file["id"],
        endpoint="/v2/models/identity/infer",  # type: ignore[arg-type]
        completion_window="24h",
    )
    until(lambda: len(receiver.received), 30, lambda count: count == 2)
    ended(server, job_id)

    about = {}
    for request in receiver.received:
        event = client.webhooks.unwrap(
            request.body, request.headers, secret=endpoint.signing_secret
        )
        Webhook(endpoint.signing_secret).verify(request.body, dict(request.headers))
        about[event.type] = event
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(
                request.body + b" ", request.headers, secret=endpoint.signing_secret
            )
    completed: Any = about.pop("batch.completed")
    assert isinstance(completed, shapes.BatchCompletedWebhookEvent)
    assert strict(completed).data.id == batch.id
    assert completed.created_at == client.batches.retrieve(batch.id).completed_at
    (succeeded,) = (request.json() for request in receiver.received if b"job." in request.body)
    assert succeeded["data"] == {"id": job_id, "status": "succeeded"}

    found = logged(server, endpoint.id, "delivered", 2)
    assert {one["id"] for one in found} == set(receiver.ids)
    for one in found:
        (attempt,) = one["attempts"]
        assert (attempt["status_code"], attempt["response"], attempt["error"]) == (
            200,
            "thanks",
            None,
        )
        assert one["event"]["type"] == one["event_type"]
        assert one["next_attempt_at"] is None
        path = f"{ENDPOINTS}/{endpoint.id}/deliveries/{one['id']}"
        assert server.get(path).json() == one
    page = server.get(f"{ENDPOINTS}/{endpoint.id}/deliveries?limit=1").json()
    assert page["has_more"]
    rest = server.get(f"{ENDPOINTS}/{endpoint.id}/deliveries?after={page['last_id']}").json()
    assert page["data"] + rest["data"] == found


def test_a_receiver_that_was_down_is_told_later_under_the_same_id(
    server: Http, client: openai.OpenAI, receiver: Receiver, own_database: Database
) -> None:
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=JOB_EVENTS)
    receiver.stop()
    job_id = job(server)
    assert ended(server, job_id)["status"] == "succeeded"
    # The row and its attempts are read one after the other: what ends in between shows in one.
    (pending,) = until(
        lambda: log(server, endpoint.id),
        20,
        lambda found: bool(found and found[0]["attempts"] and found[0]["next_attempt_at"]),
    )
    assert pending["state"] == "pending"
    assert pending["attempts"][0]["error"] == "the connection was refused"

    receiver.start()
    sql(own_database, "UPDATE deliveries SET not_before = now() WHERE state = 'pending'")
    (delivered,) = logged(server, endpoint.id, "delivered")
    assert receiver.ids == [pending["id"]] == [delivered["id"]]
    assert [one["status_code"] for one in delivered["attempts"]] == [None, 200]

    reply = server.post(f"{ENDPOINTS}/{endpoint.id}/deliveries/{pending['id']}/resend")
    assert (reply.status, reply.json()["id"]) == (202, pending["id"])
    until(lambda: receiver.ids, 20, lambda ids: ids == [pending["id"]] * 2)


def test_a_sweeper_that_dies_in_the_middle_leaves_its_delivery_to_the_next(
    server: Http,
    client: openai.OpenAI,
    receiver: Receiver,
    own: Stack,
    own_database: Database,
) -> None:
    let_go = threading.Event()

    def hang(_: Received) -> Say:
        let_go.wait(30)
        return Say()

    receiver.answer = hang
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=JOB_EVENTS)
    job(server)
    until(lambda: receiver.received, 20)
    own.kill("sweeper")
    let_go.set()
    sql(own_database, "UPDATE deliveries SET lease_until = now() WHERE lease_until IS NOT NULL")
    own.start(only=("sweeper",))

    (delivered,) = logged(server, endpoint.id, "delivered")
    assert receiver.ids == [delivered["id"]] * 2
    assert delivered["attempt_count"] == 2


def test_410_disables_an_endpoint_until_it_is_enabled(
    server: Http, client: openai.OpenAI, receiver: Receiver
) -> None:
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=JOB_EVENTS)
    receiver.answer = lambda _: Say(410)
    job(server)
    (failed,) = logged(server, endpoint.id, "failed")
    shown = server.get(f"{ENDPOINTS}/{endpoint.id}").json()
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "it answered 410 Gone")
    resend = server.post(f"{ENDPOINTS}/{endpoint.id}/deliveries/{failed['id']}/resend")
    assert (resend.status, resend.headers["x-should-retry"]) == (409, "false")
    with pytest.raises(openai.ConflictError):
        client.webhooks.test(endpoint.id, event_type="batch.failed")

    receiver.answer = lambda _: Say()
    enabled = client.webhooks.update(endpoint.id, extra_body={"enabled": True})
    assert enabled.to_dict()["enabled"] is True
    resend = server.post(f"{ENDPOINTS}/{endpoint.id}/deliveries/{failed['id']}/resend")
    assert resend.status == 202
    logged(server, endpoint.id, "delivered")
    job(server)
    logged(server, endpoint.id, "delivered", 2)


def test_a_test_says_what_the_endpoint_answered(client: openai.OpenAI, receiver: Receiver) -> None:
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=JOB_EVENTS)
    for status in (200, 500):
        receiver.answer = lambda _, status=status: Say(status)  # type: ignore[misc]
        told = strict(client.webhooks.test(endpoint.id, event_type="batch.completed"))
        assert (told.status_code, told.success, told.event_type) == (
            status,
            True,
            "batch.completed",
        )
        assert told.webhook_endpoint_id == endpoint.id
    request = receiver.received[0]
    event = client.webhooks.unwrap(request.body, request.headers, secret=endpoint.signing_secret)
    assert isinstance(event, shapes.BatchCompletedWebhookEvent)
    receiver.stop()
    with pytest.raises(openai.BadRequestError, match="refused") as caught:
        client.webhooks.test(endpoint.id, event_type="batch.completed")
    assert caught.value.param == "url"


def test_what_is_sent_again_under_its_key_is_delivered_once(
    server: Http, client: openai.OpenAI, receiver: Receiver
) -> None:
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=JOB_EVENTS)
    path = f"{ENDPOINTS}/{endpoint.id}"
    tests = [
        server.post(f"{path}/test", {"event_type": "job.failed"}, Idempotency_Key="test")
        for _ in range(2)
    ]
    (delivery,) = logged(server, endpoint.id, "delivered")
    first = server.post(f"{path}/deliveries/{delivery['id']}/resend", Idempotency_Key="resend")
    until(lambda: len(receiver.received) == 2, 20)
    logged(server, endpoint.id, "delivered")
    again = server.post(f"{path}/deliveries/{delivery['id']}/resend", Idempotency_Key="resend")

    assert [(reply.status, reply.json()) for reply in tests] == [(200, tests[0].json())] * 2
    assert (first.status, again.status) == (202, 202)
    assert (again.json()["id"], again.json()["state"]) == (delivery["id"], "delivered")
    for one, other in (tests, (first, again)):
        assert one.headers["Idempotent-Replayed"] is None
        assert other.headers["Idempotent-Replayed"] == "true"
    assert len(receiver.received) == 2


def test_jobs_end_while_a_receiver_hangs(
    server: Http, client: openai.OpenAI, receiver: Receiver
) -> None:
    let_go = threading.Event()

    def hang(_: Received) -> Say:
        let_go.wait(30)
        return Say()

    receiver.answer = hang
    with receiving() as quick:
        client.webhooks.create(name="slow", url=receiver.url, event_types=JOB_EVENTS)
        client.webhooks.create(name="quick", url=quick.url, event_types=JOB_EVENTS)
        jobs = [job(server) for _ in range(10)]
        for one in jobs:
            assert ended(server, one)["status"] == "succeeded"
        until(lambda: len(quick.received), 20, lambda count: count == len(jobs))
        assert not let_go.is_set()
        let_go.set()


SAMPLE = re.compile(r"<!-- run: receiver -->\n```python\n(.*?)```", re.DOTALL)


def test_the_receiver_of_the_documentation_works(
    server: Http, client: openai.OpenAI, root: Path
) -> None:
    (code,) = SAMPLE.findall((root / "docs/api.md").read_text())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    endpoint = client.webhooks.create(name="n", url=url, event_types=JOB_EVENTS)
    sample = subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            "PATH": os.environ["PATH"],
            "WEBHOOK_SECRET": endpoint.signing_secret,
            "PORT": str(port),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        until(lambda: listening(port), 20)
        job_id = job(server)
        (delivered,) = logged(server, endpoint.id, "delivered")
        assert sample.stdout is not None
        assert sample.stdout.readline() == f"job.succeeded {job_id}\n"
        # Whoever else calls is refused.
        assert Http(url).post("/", {"type": "job.succeeded"}).status == 400
        assert delivered["attempts"][0]["status_code"] == 204
    finally:
        sample.kill()
        sample.communicate()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Walls


def test_another_tenants_webhooks_are_not_there(
    server: Http, own: Stack, own_database: Database, receiver: Receiver
) -> None:
    made = server.post(
        ENDPOINTS, {"name": "n", "url": receiver.url, "event_types": ["job.succeeded"]}
    ).json()
    job(server)
    (delivery,) = logged(server, made["id"], "delivered")
    keys = Keys(own_database, own.env["TIDEGATE_SECRET"])
    stranger = Http.keyed(server.url, keys.create(os.urandom(6).hex()))
    path = f"{ENDPOINTS}/{made['id']}"
    unknown = f"{ENDPOINTS}/we_{'0' * 32}"
    rest: list[tuple[str, str, object]] = [
        ("GET", "", None),
        ("POST", "", {"name": "mine now"}),
        ("DELETE", "", None),
        ("POST", "/rotate_secret", {}),
        ("POST", "/test", {"event_type": "job.failed"}),
        ("GET", "/deliveries", None),
        ("GET", f"/deliveries/{delivery['id']}", None),
        ("POST", f"/deliveries/{delivery['id']}/resend", None),
    ]
    for method, below, body in rest:
        theirs = stranger(method, path + below, body)
        nobodys = stranger(method, unknown + below, body)
        assert (theirs.status, theirs.body) == (404, nobodys.body), (method, below)
    assert stranger.get(ENDPOINTS).json()["data"] == []
    # Neither is a delivery of another endpoint of one's own.
    other = server.post(ENDPOINTS, GOOD).json()["id"]
    assert server.get(f"{ENDPOINTS}/{other}/deliveries/{delivery['id']}").status == 404
    assert server.post(f"{ENDPOINTS}/{other}/deliveries/{delivery['id']}/resend").status == 404
    assert server.get(path).json()["name"] == "n"
    assert len(receiver.received) == 1


@contextmanager
def canary() -> Iterator[Receiver]:
    with receiving() as bird:
        yield bird
        assert bird.connections == 0


def test_with_the_guard_on_nobody_inside_is_called(fresh: Http, stack_settings: Settings) -> None:
    database = Database(stack_settings.database_url, pool_size=1)
    with canary() as bird:
        hosts = ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", socket.gethostname().lower()]
        urls = [f"https://{host}:{bird.port}/" for host in hosts]
        for url in [bird.url, *urls[:-1]]:
            assert fresh.post(ENDPOINTS, GOOD | {"url": url}).status == 400
        # As if their names had been public when they were registered.
        made = []
        for url in [bird.url, *urls]:
            one = fresh.post(ENDPOINTS, GOOD | {"event_types": ["job.succeeded"]}).json()["id"]
            sql(
                database,
                "UPDATE webhooks SET url = :url WHERE replace(id::text, '-', '') = :id",
                url=url,
                id=one.removeprefix("we_"),
            )
            made.append(one)
        job(fresh)
        for one in made:
            (found,) = until(
                lambda one=one: log(fresh, one),  # type: ignore[misc]
                20,
                lambda found: bool(found and found[0]["attempts"]),
            )
            assert found["attempts"][0]["error"].startswith("refused: ")
            assert found["attempts"][0]["status_code"] is None
    for one in made:
        fresh("DELETE", f"{ENDPOINTS}/{one}")
    database.close()
