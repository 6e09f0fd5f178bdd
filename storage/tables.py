"""The tables. `migrations/` makes them; a test checks that both say the same."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

JSON = JSONB(none_as_null=True)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)


def _time(name: str, *, default: bool = False) -> Column[object]:
    return Column(
        name,
        DateTime(timezone=True),
        nullable=not default,
        server_default=func.now() if default else None,
    )


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


tenants = Table(
    "tenants",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", Integer, nullable=False, server_default=text("1")),
    _time("created_at", default=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("prefix", Text, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("digest", LargeBinary, nullable=False),
    _time("created_at", default=True),
    _time("revoked_at"),
)

files = Table(
    "files",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("object_key", Text, nullable=False),
    _time("created_at", default=True),
    _time("expires_at"),
    _time("deleted_at"),
    _time("purged_at"),
    Index("ix_files_list", "tenant_id", "id", postgresql_where=text("deleted_at IS NULL")),
    # What retention looks for: files that are over, and whose bytes are still there.
    Index("ix_files_expiry", "expires_at", postgresql_where=text("purged_at IS NULL")),
    Index(
        "ix_files_deleted",
        "id",
        postgresql_where=text("purged_at IS NULL AND deleted_at IS NOT NULL"),
    ),
    Index("ix_files_purged", "purged_at", postgresql_where=text("purged_at IS NOT NULL")),
    # What the collector asks for.
    Index("ix_files_object_key", "object_key", postgresql_where=text("purged_at IS NULL")),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("group_name", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False, server_default=text("''")),
    Column("priority", SmallInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("outcome", Text),
    Column("input", LargeBinary),
    Column("input_key", Text),
    Column("result", LargeBinary),
    Column("result_key", Text),
    Column("error", JSON),
    Column("metadata", JSON),
    Column("worker", Text),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("chunks_total", Integer, nullable=False, server_default=text("0")),
    Column("chunks_done", Integer, nullable=False, server_default=text("0")),
    _count("items_total"),
    _count("items_ok"),
    _count("items_failed"),
    _time("created_at", default=True),
    _time("deadline_at", default=True),
    _time("started_at"),
    _time("running_at"),
    _time("finalizing_at"),
    _time("cancelling_at"),
    _time("finished_at"),
    # When retention took the input and the result; the rest of the row stays a while longer.
    _time("purged_at"),
    # The job whose dead letters this one runs again.
    Column("redrive_of", UUID(as_uuid=True)),
    Index("ix_jobs_list", "tenant_id", "id"),
    Index("ix_jobs_list_by_state", "tenant_id", "state", "id"),
    Index("ix_jobs_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
    # A redriven job has the input of the job before it: who else names this object?
    Index("ix_jobs_input_key", "input_key", postgresql_where=text("input_key IS NOT NULL")),
    Index(
        "ix_jobs_unpurged",
        "finished_at",
        postgresql_where=text("finished_at IS NOT NULL AND purged_at IS NULL"),
    ),
    Index(
        "ix_jobs_deadline",
        "deadline_at",
        postgresql_where=text("state IN ('queued', 'running', 'finalizing', 'cancelling')"),
    ),
)

batches = Table(
    "batches",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("output_ttl", Integer),
    # What to do with a file of arrays; null where it is lines.
    Column("arrays", JSON),
    # What reading that file in found, and the object that its ranges lie in, if not the file.
    Column("layout", JSON),
    Column("staged_key", Text),
    Column("input_file_id", ForeignKey("files.id"), nullable=False),
    Column("output_file_id", ForeignKey("files.id")),
    Column("error_file_id", ForeignKey("files.id")),
    Column("errors", JSON),
    Index("ix_batches_list", "tenant_id", "job_id"),
    # Who reads a file, and may it go?
    Index("ix_batches_input_file_id", "input_file_id"),
    Index("ix_batches_output_file_id", "output_file_id"),
    Index("ix_batches_error_file_id", "error_file_id"),
)

chunks = Table(
    "chunks",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("group_name", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("item_count", BigInteger, nullable=False),
    Column("first_line", BigInteger, nullable=False, server_default=text("0")),
    Column("byte_start", BigInteger, nullable=False, server_default=text("0")),
    Column("byte_end", BigInteger, nullable=False, server_default=text("0")),
    Column("duplicates", JSON),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("lease_token", BigInteger, nullable=False, server_default=text("0")),
    Column("worker", Text),
    Column("output_key", Text),
    Column("error_key", Text),
    _count("items_ok"),
    _count("items_failed"),
    Column("error", JSON),
    _time("created_at", default=True),
    _time("not_before", default=True),
    _time("released_at"),
    # How often a hint went out since the last claim.
    Column("hints", SmallInteger, nullable=False, server_default=text("0")),
    _time("lease_until"),
    _time("finished_at"),
    # A dead letter that runs again, and as which job.
    Column("redriven_as", UUID(as_uuid=True)),
    UniqueConstraint("job_id", "seq"),
    Index("ix_chunks_dead", "tenant_id", "id", postgresql_where=text("state = 'dead'")),
    # The pump walks the tenants of one class and takes each one's oldest rows.
    Index(
        "ix_chunks_queued",
        "group_name",
        "priority",
        "tenant_id",
        "id",
        postgresql_where=text("state = 'queued'"),
    ),
    # What the sweeper does where no worker does.
    Index(
        "ix_chunks_control",
        "id",
        postgresql_where=text("kind IN ('plan', 'finalize') AND state IN ('queued', 'released')"),
    ),
    # Credit in use, silent hints, expired leases: few rows, whatever the backlog.
    Index(
        "ix_chunks_active",
        "group_name",
        "state",
        postgresql_where=text("state IN ('released', 'running')"),
    ),
)

shares = Table(
    "shares",
    metadata,
    Column("group_name", Text, primary_key=True),
    Column("priority", SmallInteger, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("deficit", BigInteger, nullable=False),
)
"""What the pump owes each tenant, in items: the memory of deficit round robin."""

realtime_records = Table(
    "realtime_records",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("created_at", DateTime(timezone=True), primary_key=True),
    Column("tenant_id", UUID(as_uuid=True), nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("error", JSON),
    Column("duration_ms", Integer, nullable=False),
    Column("batch_size", Integer, nullable=False),
    Column("cached", Boolean, nullable=False, server_default=text("false")),
    Index("ix_realtime_records_list", "tenant_id", "id"),
    postgresql_partition_by="RANGE (created_at)",
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("resource_id", UUID(as_uuid=True), nullable=False),
    # What was answered, where that is more than one resource.
    Column("answer", JSON),
    _time("created_at", default=True),
    Index("ix_idempotency_keys_created_at", "created_at"),
)
"""What a client's `Idempotency-Key` made, written in the transaction that made it."""

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("events", JSON, nullable=False),
    Column("generation", Integer, nullable=False, server_default=text("1")),
    # Until then the secret of the generation before signs, too.
    _time("previous_until"),
    _time("disabled_at"),
    Column("disabled_why", Text),
    _time("created_at", default=True),
    _time("updated_at", default=True),
    Index("ix_webhooks_tenant", "tenant_id", "id"),
)
"""Where a tenant wants to hear of its jobs. Signing secrets are derived (of the deployment secret,
the id and the generation), so that a copy of the table signs nothing."""

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("webhook_id", ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("event", Text, nullable=False),
    Column("job_id", UUID(as_uuid=True)),
    Column("payload", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("lease_token", BigInteger, nullable=False, server_default=text("0")),
    Column("error", Text),
    _time("created_at", default=True),
    _time("not_before", default=True),
    _time("lease_until"),
    _time("finished_at"),
    # Each endpoint's next ones, whatever the others' backlogs.
    Index(
        "ix_deliveries_due", "webhook_id", "not_before", postgresql_where=text("state = 'pending'")
    ),
    # Those being tried: few rows, whatever the backlog.
    Index("ix_deliveries_flying", "webhook_id", postgresql_where=text("lease_until IS NOT NULL")),
    Index("ix_deliveries_webhook", "webhook_id", "id"),
)
"""Events to be delivered: written in the transaction that ended the job, so that none is missed."""

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("status", Integer),
    Column("error", Text),
    Column("response", Text),
    Column("duration_ms", Integer, nullable=False),
    _time("created_at", default=True),
)
"""What came of each try."""

walks = Table(
    "walks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("after", Text, nullable=False, server_default=text("''")),
    Column("owner", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("lease_token", BigInteger, nullable=False),
    _time("lease_until"),
)
"""Where whoever walks through the object store has got to. `owner` marks the store as this
ledger's: what another one does not name is no garbage."""
