"""Job ids: UUIDv7, so that they sort by time.

A realtime request gets its id before anything about it is stored, and its record is written
behind. To answer for an id whose record a crash took along, the id itself proves that we gave it
to this tenant: the low 40 bits are a keyed hash of the rest.

    48 bits  milliseconds since the epoch      12 bits  random      2  variant
     4 bits  version 7                         22 bits  random     40  keyed BLAKE2b
"""

from __future__ import annotations

import hashlib
import hmac
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

_MAC_BITS = 40
_MAC_MASK = (1 << _MAC_BITS) - 1


class IdMint:
    """Mints ids and recognises its own. Every gateway of a deployment shares the secret."""

    def __init__(
        self,
        secret: str,
        clock: Callable[[], float] = time.time,
        bits: Callable[[int], int] = random.getrandbits,
    ):
        self._key = hashlib.sha256(b"job-id:" + secret.encode()).digest()
        self._clock = clock
        # Ids are to be distinct, not secret: what they prove is in their hash.
        self._bits = bits

    def _mac(self, head: int, tenant: UUID) -> int:
        text = head.to_bytes(16, "big") + tenant.bytes
        mac = hashlib.blake2b(text, key=self._key, digest_size=_MAC_BITS // 8)
        return int.from_bytes(mac.digest(), "big")

    def mint(self, tenant: UUID) -> UUID:
        milliseconds = int(self._clock() * 1000)
        head = (milliseconds & (1 << 48) - 1) << 80
        head |= 0x7 << 76 | self._bits(12) << 64
        head |= 0b10 << 62 | self._bits(22) << _MAC_BITS
        return UUID(int=head | self._mac(head, tenant))

    def minted(self, job_id: UUID, tenant: UUID) -> bool:
        """True where this deployment gave this id to this tenant."""
        head = job_id.int & ~_MAC_MASK
        return hmac.compare_digest(
            (job_id.int & _MAC_MASK).to_bytes(5, "big"), self._mac(head, tenant).to_bytes(5, "big")
        )


def created_at(job_id: UUID) -> datetime:
    """The moment a UUIDv7 was made, to the millisecond."""
    return datetime.fromtimestamp((job_id.int >> 80) / 1000, tz=UTC)
