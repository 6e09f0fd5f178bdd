"""Tenants and their API keys.

A key reads `tg_live_<8 public>_<43 secret>`. The database holds its public prefix and an
HMAC-SHA-256 under the deployment's secret: a copy of the table opens nothing.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids
from sqlalchemy.dialects.postgresql import insert

from errors import BadRequest, Unauthenticated
from storage import tables
from storage.database import Database

_FORM = re.compile(r"(tg_live_[A-Za-z0-9]{8})_[A-Za-z0-9_-]{43}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def new_key() -> str:
    """A fresh key: 256 random bits behind a public prefix."""
    public = "".join(secrets.choice(_LETTERS) for _ in range(8))
    return f"tg_live_{public}_{secrets.token_urlsafe(32)}"


@dataclass(frozen=True, slots=True)
class Keys:
    """API keys in the database. `secret` is the pepper of the digests."""

    database: Database
    secret: str

    def _digest(self, key: str) -> bytes:
        return hmac.digest(b"api-key:" + self.secret.encode(), key.encode(), "sha256")

    def create(self, tenant: str, key: str | None = None, *, weight: int = 1) -> str:
        """Give a tenant (made where there is none) a key; the key, which nothing shows again.
        Giving the same key again changes nothing. Raises `BadRequest` for a malformed one."""
        key = key or new_key()
        match = _FORM.fullmatch(key)
        if not match:
            raise BadRequest(
                "an API key reads tg_live_<8 letters or digits>_<43 url-safe characters>"
            )
        with self.database.transaction() as connection:
            connection.execute(
                insert(tables.tenants)
                .values(id=uuids.uuid7(), name=tenant, weight=weight)
                .on_conflict_do_nothing()
            )
            tenant_id = connection.execute(
                sa.select(tables.tenants.c.id).where(tables.tenants.c.name == tenant)
            ).scalar_one()
            connection.execute(
                insert(tables.api_keys)
                .values(prefix=match[1], tenant_id=tenant_id, digest=self._digest(key))
                .on_conflict_do_nothing()
            )
        return key

    def tenant_of(self, key: str) -> UUID:
        """Whose key this is. Raises `Unauthenticated` for any key that is not good."""
        match = _FORM.fullmatch(key)
        row = None
        if match:
            with self.database.transaction() as connection:
                row = connection.execute(
                    sa.select(tables.api_keys.c.tenant_id, tables.api_keys.c.digest).where(
                        tables.api_keys.c.prefix == match[1],
                        tables.api_keys.c.revoked_at.is_(None),
                    )
                ).one_or_none()
        # The same work for an unknown prefix as for a known one.
        digest = bytes(row.digest) if row else bytes(32)
        if not hmac.compare_digest(self._digest(key), digest) or row is None:
            raise Unauthenticated("the API key is not valid")
        tenant: UUID = row.tenant_id
        return tenant

    def revoke(self, prefix: str) -> bool:
        """End a key by its public prefix; gateways notice within `TIDEGATE_KEY_TTL`."""
        with self.database.transaction() as connection:
            return (
                connection.execute(
                    sa.update(tables.api_keys)
                    .where(
                        tables.api_keys.c.prefix == prefix, tables.api_keys.c.revoked_at.is_(None)
                    )
                    .values(revoked_at=sa.func.now())
                ).rowcount
                == 1
            )
