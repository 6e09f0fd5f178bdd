"""The stack's passwords: made at the first start, kept in one private file, reused."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import string
from dataclasses import asdict, dataclass
from pathlib import Path

from ops.embedded.process import StackError

LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Credentials:
    postgres: str
    redis: str
    flower: str
    secret: str
    """TIDEGATE_SECRET."""
    api_key: str
    """The key of the tenant `default`."""

    def derived(self, name: str) -> str:
        """One more password, which the file does not hold and an older file does not lack."""
        return hmac.digest(self.secret.encode(), f"stack:{name}".encode(), "sha256").hex()


def new() -> Credentials:
    public, private = (
        "".join(secrets.choice(LETTERS) for _ in range(length)) for length in (8, 43)
    )
    return Credentials(
        postgres=secrets.token_urlsafe(32),
        redis=secrets.token_urlsafe(32),
        flower=secrets.token_urlsafe(32),
        secret=secrets.token_urlsafe(48),
        api_key=f"tg_live_{public}_{private}",
    )


def load_or_make(path: Path) -> Credentials:
    """The credentials kept at `path`, which is written, for its owner alone, if it is not there."""
    if not path.exists():
        write_private(path, json.dumps(asdict(new()), indent=2) + "\n")
    try:
        return Credentials(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise StackError(
            f"{path} is not readable as credentials ({error}). The data beside it was made with"
            f" them: restore the file, or remove the folder {path.parent} and start afresh"
        ) from error


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, at no moment half written or open to others."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
