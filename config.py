"""Settings: read once from the environment, frozen, every mistake reported at once.

Each field `name` is the variable `TIDEGATE_NAME`. Durations are seconds, sizes are bytes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import environs
from marshmallow import validate

DAY = 24 * 3600.0
KIB = 1024
MIB = 1024 * KIB


class ConfigError(ValueError):
    """One or more settings are missing or wrong; the message lists them all."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """An S3 bucket, and how to get at it."""

    endpoint: str
    """`host` or `host:port`."""
    name: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    region: str = "us-east-1"
    secure: bool = True
    """By TLS."""


_BUCKET = re.compile(
    r"(?=.{3,63}\Z)(?!\d+(\.\d+){3}\Z)"
    r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
)


def parse_objects(url: str) -> Path | Bucket:
    """Where an objects URL leads: a folder, or a bucket. Raises `ConfigError`, which never repeats
    the URL: a password may be in it."""
    if url.startswith("file:///"):
        return Path(url.removeprefix("file://"))
    if not url.startswith("s3://"):
        raise ConfigError(
            "file:///absolute/folder or s3://ACCESS:SECRET@host:port/bucket?region=…&secure=…"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not parts.username or not parts.password:
        raise ConfigError(
            "s3://ACCESS:SECRET@host:port/bucket needs a host and both keys, in which / is written"
            " %2F, @ %40, : %3A and % %25"
        )
    name = parts.path.strip("/")
    if not _BUCKET.fullmatch(name):
        raise ConfigError("the path is to be the name of one bucket: 3 to 63 of a-z, 0-9, . and -")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    region, secure = options.pop("region", "us-east-1"), options.pop("secure", "true")
    if options:
        raise ConfigError(f"{', '.join(sorted(options))}: only region and secure are options")
    if not region or secure not in ("true", "false"):
        raise ConfigError("region is a name, secure is true or false")
    return Bucket(
        endpoint=(f"[{host}]" if ":" in host else host) + (f":{port}" if port else ""),
        name=name,
        access_key=unquote(parts.username),
        secret_key=unquote(parts.password),
        region=region,
        secure=secure == "true",
    )


def _objects_problem(url: str) -> str:
    try:
        parse_objects(url)
    except ConfigError as error:
        return f"TIDEGATE_OBJECTS_URL: {error}"
    return ""


@dataclass(frozen=True, slots=True)
class Settings:
    """One deployment's settings. Built by `load`; tests build their own."""

    # Stores
    database_url: str = field(repr=False)
    """Postgres, as SQLAlchemy reads it: `postgresql+psycopg2://user:password@host/name`."""
    redis_url: str = field(repr=False)
    """Reply lists and tensors in flight: `redis://:password@host:6379/0`, `noeviction`."""
    objects_url: str = field(repr=False)
    """Where outputs and files live: `file:///absolute/folder`, or a bucket of this deployment's
    own, `s3://ACCESS:SECRET@host:port/bucket?region=us-east-1&secure=true`."""
    secret: str = field(repr=False)
    """Key for job-id signatures, API-key digests and webhook secrets; the same in every process."""

    # Broker
    broker_url: str = field(default="", repr=False)
    """Empty: the Redis of `redis_url`. Or RabbitMQ: `amqp://user:password@host/vhost`."""
    namespace: str = "tidegate"
    """Prefix of every Redis key of this deployment, the broker's among them. On RabbitMQ a virtual
    host is a deployment."""
    monitoring: bool = True
    """Send Celery task events (of durable work) and answer remote control (Flower, `celery
    inspect`)."""

    # Worker
    group: str = "default"
    """The worker group that serves requests where nothing else says so."""
    triton_url: str = "127.0.0.1:8001"
    """gRPC address of the Triton server of GPU worker `--gpu none`; `{gpu}` is replaced."""
    realtime_slots: int = 16
    """Realtime messages one GPU worker runs at a time. Batch work never takes these."""
    batch_slots: int = 4
    """Batch hints one GPU worker runs at a time."""

    # Ledger
    lease: float = 8.0
    """A claimed chunk that is silent this long belongs to whoever claims it next."""
    max_attempts: int = 3
    """Claims of one chunk, crashes included, before it is a dead letter."""
    sweep_interval: float = 1.0
    """Between two looks for lost hints, expired leases and passed deadlines."""
    attempt_timeout: float = 600.0
    """The longest one attempt at a chunk may take. Past it its calls are cancelled and the attempt
    counts as failed; a worker whose slot does not come back even then ends itself."""
    hint_timeout: float = 5.0
    """A released chunk nobody claimed for this long is released again; each time in vain the wait
    doubles, up to 32 times this, until a worker arrives."""
    pump_credit: int = 65_536
    """Items per group that may wait in the broker: a few seconds of work."""
    chunk_items: int = 8192
    """Most lines of a batch file in one chunk; a worker that needs longer than two seconds for them
    leaves the rest as chunks of their own."""
    chunk_bytes: int = 4 * MIB
    """Most input bytes in one chunk (a longer single line is a chunk of its own)."""
    max_batch_lines: int = 10_000_000
    """Most lines of a batch file."""
    max_line_bytes: int = 32 * MIB
    """Most bytes of one line; a longer one goes to the error file."""
    inline_bytes: int = 32 * KIB
    """Inputs and results up to this size stay in Postgres; larger ones go to the object store."""
    job_deadline: float = 24 * 3600.0
    """Default time from accept to a terminal state."""

    # Retention
    result_ttl: float = 7 * DAY
    """How long the input and the result of an ended job are kept; then 410."""
    job_ttl: float = 30 * DAY
    """How long an ended job, or the record of a realtime request, can be looked up; then 404."""
    file_ttl: float = 30 * DAY
    """How long a file is kept that was given no expiry of its own."""
    idempotency_ttl: float = 2 * DAY
    """How long an `Idempotency-Key` is remembered: a day at least."""
    garbage_age: float = 3600.0
    """An object that nothing in the ledger names goes when it is this old."""

    # Webhooks
    webhook_timeout: float = 15.0
    """The longest one delivery may take."""
    webhook_insecure: bool = False
    """Deliver to http and to private addresses, too: for development only."""

    # Gateway
    max_body_bytes: int = 64 * MIB
    """Most bytes of a request body, before and after inflating."""
    max_file_bytes: int = 8192 * MIB
    """Most bytes of an uploaded file."""
    realtime_timeout: float = 30.0
    """Default deadline of a realtime request."""
    max_realtime_timeout: float = 300.0
    """The longest deadline a realtime request may ask for; it is cut to this."""
    max_queue_time: float = 5.0
    """A realtime request that is likely to wait longer than this for its turn, or longer than half
    of its own time, is refused: 503 with `Retry-After`. At once, but a flood at a pace."""
    max_wait: float = 60.0
    """Most seconds of `Prefer: wait=n`."""
    max_streams: int = 1000
    """Event streams one gateway process serves at a time; beyond it 503."""
    max_tenant_streams: int = 250
    """Those of them that one tenant may hold."""
    coalesce_window: int = 3
    """Messages in flight per gateway process and model before requests gather in the next one."""
    coalesce_items: int = 64
    """Most requests in one message."""
    metrics_bind: str = ""
    """`host:port` where a gateway shows `/metrics`, out of tenants' reach. Empty: nowhere."""
    cache_bytes: int = 64 * MIB
    """Most bytes of answers that one gateway process keeps, of models that are marked for it."""
    cache_redis_bytes: int = 64 * MIB
    """Most bytes of answers that all gateways together keep in Redis."""
    catalog_ttl: float = 5.0
    """How long a gateway trusts what a worker said about a model."""
    key_ttl: float = 15.0
    """How long a gateway trusts an API key it has checked: the most a revocation lags. While
    Postgres is away, or is slow to answer, keys that were good stay good, for ten minutes at most.
    """

    def __post_init__(self) -> None:
        objects = _objects_problem(self.objects_url)
        problems = [
            message
            for broken, message in (
                (len(self.secret) < 16, "TIDEGATE_SECRET: at least 16 characters"),
                (
                    self.lease < 2 * self.sweep_interval,
                    "TIDEGATE_LEASE: at least two sweep intervals, or live work is swept",
                ),
                (bool(objects), objects),
                (
                    not re.fullmatch(r"|.+:[0-9]{1,5}", self.metrics_bind),
                    "TIDEGATE_METRICS_BIND: host:port",
                ),
                (
                    self.max_batch_lines > 400_000 * self.chunk_items,
                    "TIDEGATE_CHUNK_ITEMS: at least TIDEGATE_MAX_BATCH_LINES / 400000, or a batch"
                    " has more chunks than one statement ends",
                ),
                (
                    self.attempt_timeout < 2 * self.lease,
                    "TIDEGATE_ATTEMPT_TIMEOUT: at least two leases",
                ),
                (
                    self.idempotency_ttl < DAY,
                    "TIDEGATE_IDEMPOTENCY_TTL: at least a day (86400)",
                ),
                (
                    self.job_ttl < self.result_ttl,
                    "TIDEGATE_JOB_TTL: at least TIDEGATE_RESULT_TTL, or results outlive their jobs",
                ),
                (
                    self.garbage_age < 60,
                    "TIDEGATE_GARBAGE_AGE: at least 60, or what is being written is swept",
                ),
                (
                    self.coalesce_items > 200,
                    "TIDEGATE_COALESCE_ITEMS: at most 200, or messages outgrow 4 KiB",
                ),
                (
                    self.realtime_timeout > self.max_realtime_timeout,
                    "TIDEGATE_REALTIME_TIMEOUT: more than TIDEGATE_MAX_REALTIME_TIMEOUT",
                ),
            )
            if broken
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def broker(self) -> str:
        return self.broker_url or self.redis_url

    @property
    def metrics_port(self) -> int:
        """0: there is none."""
        return int(self.metrics_bind.rpartition(":")[2] or 0)

    def triton_address(self, gpu: str) -> str:
        """The Triton of one GPU: `127.0.0.1:80{gpu}1` on GPU 2 is `127.0.0.1:8021`."""
        return self.triton_url.replace("{gpu}", "0" if gpu == "none" else gpu)


_POSITIVE = validate.Range(min=0, min_inclusive=False)
_READERS = {"str": "str", "int": "int", "float": "float", "bool": "bool"}


def load(**overrides: object) -> Settings:
    """Settings from `TIDEGATE_*`, checked together. Keyword arguments win over the environment."""
    env = environs.Env(eager=False, prefix="TIDEGATE_")
    values: dict[str, object] = {}
    for setting in Settings.__dataclass_fields__.values():
        if setting.name in overrides:
            values[setting.name] = overrides[setting.name]
            continue
        read = getattr(env, _READERS[str(setting.type)])
        required = setting.name in ("database_url", "redis_url", "objects_url", "secret")
        checks = {"validate": _POSITIVE} if setting.type in ("int", "float") else {}
        name = setting.name.upper()
        values[setting.name] = (
            read(name, **checks) if required else read(name, setting.default, **checks)
        )
    try:
        env.seal()
        return Settings(**values)  # type: ignore[arg-type]
    except environs.EnvValidationError as error:
        raise ConfigError(str(error)) from error


@functools.cache
def settings() -> Settings:
    """This process's settings, read the first time somebody asks."""
    return load()
