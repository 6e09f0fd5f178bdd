"""Files, with OpenAI's wire shapes. Bytes stream both ways; no file is ever whole in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from typing import IO

import uuid_utils.compat as uuids
from flask import Response, request
from werkzeug.exceptions import UnsupportedMediaType

from errors import BadRequest, TooLarge
from storage import objects
from storage.files import FileRow, file_key
from web import described, idempotency, schemas, views
from web.context import gateway
from web.http import page_after, page_limit, read_uuid, require_key, store_deadline, tenant
from web.json import ApiBlueprint, respond

blueprint = ApiBlueprint(
    "files", __name__, url_prefix="/v1/files", description="Batch input and output"
)
blueprint.before_request(require_key)

_CONTENT_TYPES = {
    "jsonl": "application/octet-stream",
    "npy": "application/octet-stream",
    "parquet": "application/vnd.apache.parquet",
}
FORM_SLACK = 64 * 1024
"""Bytes of multipart framing around a file of the largest size."""


@blueprint.before_request
def _limit() -> None:
    request.max_content_length = gateway().services.settings.max_file_bytes + FORM_SLACK


@blueprint.post("")
@blueprint.doc(
    parameters=[idempotency.PARAMETER, described.STORE_DEADLINE], requestBody=described.UPLOAD
)
@blueprint.alt_response(200, schema=schemas.File)
@store_deadline()
def create() -> Response:
    """Upload a file: multipart with `file` and `purpose=batch`."""
    if request.mimetype != "multipart/form-data":
        # Before it is looked at: a form of another kind would be read whole, and split.
        raise UnsupportedMediaType("the body must be multipart/form-data")
    purpose = request.form.get("purpose")
    if purpose != "batch":
        raise BadRequest('purpose: must be "batch"', param="purpose")
    upload = request.files.get("file")
    if upload is None:
        raise BadRequest("file: is missing", param="file")
    ttl = _ttl()
    idempotency.given()  # One that is no good is refused before anything is stored.
    file_id = uuids.uuid7()
    key = file_key(tenant(), file_id)
    most = gateway().services.settings.max_file_bytes
    digest = hashlib.sha256()
    since = gateway().services.database.now()
    size = gateway().objects.put(key, _blocks(upload.stream, most, digest))
    row = FileRow(
        id=file_id,
        tenant_id=tenant(),
        purpose=purpose,
        filename=re.sub(r"[\x00-\x1f\x7f]", "", upload.filename or "")[:255] or "file.jsonl",
        bytes=size,
        key=key,
    )
    expiry = request.form.get("expires_after[seconds]", "")
    once = idempotency.asked(
        purpose.encode(), row.filename.encode(), expiry.encode(), digest.digest()
    )
    files = gateway().services.files
    with idempotency.still_there():
        kept = idempotency.keep(file_id, partial(files.add, row, once, ttl=ttl, since=since), key)
    return respond(views.file(kept))


def _blocks(stream: IO[bytes], most: int, digest: hashlib._Hash) -> Iterator[bytes]:
    size = 0
    while block := stream.read(objects.BLOCK):
        size += len(block)
        if size > most:
            raise TooLarge(f"file: larger than {most} bytes", param="file")
        digest.update(block)
        yield block


def _ttl() -> int | None:
    """Seconds to keep the file; None where it doesn't say."""
    told = {name for name in request.form if name.startswith("expires_after")}
    if not told:
        return None
    if not told <= {"expires_after[anchor]", "expires_after[seconds]"}:
        raise BadRequest(
            "expires_after: is sent as expires_after[anchor] and expires_after[seconds]",
            param="expires_after",
        )
    seconds = request.form.get("expires_after[seconds]", "")
    if request.form.get("expires_after[anchor]", "created_at") != "created_at":
        raise BadRequest('expires_after.anchor: must be "created_at"', param="expires_after")
    if not re.fullmatch(r"[0-9]{1,7}", seconds) or not 3600 <= int(seconds) <= 2_592_000:
        raise BadRequest("expires_after.seconds: from 3600 to 2592000", param="expires_after")
    return int(seconds)


@blueprint.get("")
@blueprint.doc(parameters=[described.PURPOSE, described.ORDER, *described.page(10_000, 10_000)])
@blueprint.alt_response(200, schema=schemas.FilePage)
def files() -> Response:
    """This tenant's files. `purpose`, `order=asc|desc`, `limit`, `after`."""
    limit = page_limit(10_000, 10_000)
    order = request.args.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest("order: asc or desc", param="order")
    rows = gateway().services.files.list(
        tenant(),
        after=page_after(lambda text: read_uuid(text, "file-", "file")),
        limit=limit + 1,
        purpose=request.args.get("purpose"),
        ascending=order == "asc",
    )
    return respond(views.page(rows, limit, views.file))


def find(file_id: str) -> FileRow:
    """This tenant's file of this id. Raises `NotFound`, `Gone`."""
    return gateway().services.files.get(tenant(), read_uuid(file_id, "file-", "file"))


@blueprint.get("/<file_id>")
@blueprint.alt_response(200, schema=schemas.File)
def retrieve(file_id: str) -> Response:
    """What is known about a file."""
    return respond(views.file(find(file_id)))


@blueprint.get("/<file_id>/content")
@blueprint.doc(parameters=[described.STORE_DEADLINE])
@blueprint.alt_response(200, description="The file's bytes.")
@store_deadline()
def content(file_id: str) -> Response:
    """The file's bytes."""
    row = find(file_id)
    blocks = gateway().objects.stream(row.key)
    kind = row.filename.rpartition(".")[2]
    kind = kind if kind in _CONTENT_TYPES else "jsonl"
    headers = {
        "Content-Length": str(row.bytes),
        "Content-Disposition": f'attachment; filename="{views.file_id(row.id)}.{kind}"',
    }
    return Response(blocks, headers=headers, content_type=_CONTENT_TYPES[kind])


@blueprint.delete("/<file_id>")
@blueprint.doc(parameters=[described.STORE_DEADLINE])
@blueprint.alt_response(200, schema=schemas.Deleted)
@store_deadline()
def delete(file_id: str) -> Response:
    """Forget a file. A batch that runs over it goes on."""
    row = find(file_id)
    if gateway().services.files.delete(tenant(), row.id):
        gateway().objects.delete(row.key)
    return respond({"id": views.file_id(row.id), "object": "file", "deleted": True})
