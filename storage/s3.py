"""Objects in an S3 bucket: any server that speaks the protocol, through the `minio` client.

Nothing is asked of the server but make and look for a bucket, put (whole or in parts), get, stat,
list, delete, and to abort an upload.
"""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, cast
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from config import Bucket
from errors import Gone, Unavailable
from storage import time_limit
from storage.objects import BLOCK, Stored, check_key
from storage.time_limit import Limit

PART = 8 << 20
"""Bytes of one part of an upload, and the most of it that is in memory: 80 GB in 10,000 parts."""
CONNECT_TIMEOUT = 3.0
READ_TIMEOUT = 20.0
"""Seconds a server may be silent, or take nothing. Together with the retries: a call that gets
nowhere ends within about a minute, and by its `time_limit` if that is sooner."""
SLICE = 1 << 18
"""Bytes that a server has to take in that time, and between two looks at the limit."""
PING_TIMEOUT = 2.0
SLOWEST_PUT = timedelta(days=1)
"""S3 dates an upload by its first moment and says nothing of later ones. None takes this long."""
CONNECTIONS = 32


class _BeyondTheEnd(Exception):
    """The range begins behind the last byte."""


_MEANING: dict[str, type[Exception]] = {"NoSuchKey": Gone, "InvalidRange": _BeyondTheEnd}
"""S3's codes that say more than that it does not work now."""


class S3Store:
    """Objects in one bucket, which is made where there is none."""

    cooperative = True

    def __init__(
        self,
        bucket: Bucket,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
    ):
        self._bucket = bucket.name
        self._region = bucket.region
        self._client = _client(bucket, connect_timeout, read_timeout, retries=2)
        # Whether it is there at all is asked often, and by somebody with little patience.
        self._prober = _client(bucket, PING_TIMEOUT, PING_TIMEOUT, retries=0)
        self._made = False

    def _ready(self) -> Minio:
        """The client, once the bucket is there."""
        if not self._made:
            with _translated("look for its bucket"):
                self._make()
            self._made = True
        return self._client

    def _make(self) -> None:
        try:
            if self._client.bucket_exists(self._bucket):
                return
        except S3Error as error:
            if error.code != "AccessDenied":
                raise
            return  # We may not look, so we may not make one either; our objects may be ours.
        try:
            self._client.make_bucket(self._bucket, self._region)
        except S3Error as error:
            # Another process was faster.
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        check_key(key)
        client = self._ready()
        source = _Source(_cut(data) if isinstance(data, bytes) else data)
        try:
            with _translated("write"):
                # One part at a time: three at once would be three in memory.
                told = client.put_object(
                    self._bucket,
                    key,
                    cast("Any", source),
                    -1,
                    part_size=PART,
                    num_parallel_uploads=1,
                )
        except Exception:
            if source.error is not None:
                # Not the store's failure, whatever came of it there.
                raise source.error from None
            raise
        if not told.etag:
            # S3 may say 200 first and think better of it in the body.
            raise Unavailable("the object store did not put the parts together", retry_after=1)
        return source.size

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        check_key(key)
        if end is not None and end <= start:
            self.size(key)
            return iter(())
        try:
            with _translated("read"):
                length = end - start if end is not None else 0
                response = self._ready().get_object(self._bucket, key, start, length)
        except _BeyondTheEnd:
            return iter(())
        body = _Body(response)
        if (start or end is not None) and response.status != 206:
            body.close()
            raise Unavailable("the object store does not answer with the range it was asked for")
        return body

    def size(self, key: str) -> int:
        check_key(key)
        with _translated("read"):
            return int(self._ready().stat_object(self._bucket, key).size or 0)

    def delete(self, key: str) -> None:
        check_key(key)
        with suppress(Gone), _translated("delete"):
            self._ready().remove_object(self._bucket, key)

    def list(self, prefix: str = "", after: str = "") -> Iterator[Stored]:
        with _translated("list"):
            for found in self._ready().list_objects(
                self._bucket, prefix, recursive=True, start_after=after or None
            ):
                modified = cast("datetime", found.last_modified)
                yield Stored(found.object_name, int(found.size or 0), modified)

    def clean(self, before: datetime) -> int:
        """Best effort: some servers list no uploads, and a lifecycle rule does the same."""
        cleaned, client = 0, self._ready()
        with suppress(Unavailable), _translated("clean-up"):
            told = client._list_multipart_uploads(self._bucket)
            for upload in told.uploads:
                if upload.initiated_time and upload.initiated_time < before - SLOWEST_PUT:
                    client._abort_multipart_upload(
                        self._bucket, upload.object_name, str(upload.upload_id)
                    )
                    cleaned += 1
        return cleaned

    def ping(self) -> None:
        """That the bucket answers; whether it may be written is seen when it is."""
        if not self._made:
            self._ready()
        with _translated("answer"):
            if not self._prober.bucket_exists(self._bucket):
                self._made = False
                raise Unavailable("the bucket is gone")


def _client(bucket: Bucket, connect: float, read: float, *, retries: int) -> Minio:
    return Minio(
        bucket.endpoint,
        bucket.access_key,
        bucket.secret_key,
        secure=bucket.secure,
        # Else every process asks for it first.
        region=bucket.region,
        http_client=_Pools(
            timeout=urllib3.Timeout(connect=connect, read=read),
            maxsize=CONNECTIONS,
            retries=_Retry(
                total=retries,
                backoff_factor=0.2,
                backoff_jitter=0.2,
                status_forcelist=(500, 502, 503, 504),
                # What the last try was told says more than that there were too many.
                raise_on_status=False,
                # A signature is for one address.
                redirect=False,
                # A server may ask for any patience; ours ends.
                respect_retry_after_header=False,
            ),
        ),
    )


@contextmanager
def _waiting(sock: socket.socket, most: float | None, limit: Limit) -> Iterator[None]:
    """The socket waits for `most` seconds, or for what is left where that is less."""
    left = limit.left()
    hasty = most is None or left < most
    sock.settimeout(left if hasty else most)
    try:
        yield
    except TimeoutError:
        if hasty:
            raise time_limit.over() from None
        raise


class _Reads(io.RawIOBase):
    """What comes in on a connection. A timeout of the socket's is for one read, and begins again
    with every byte that trickles in; the limit is for all of them."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket):
        self._raw = raw
        self._sock = sock
        self._most = sock.gettimeout()
        self._limit = time_limit.current()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        with _waiting(self._sock, self._most, self._limit):
            return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        plain: Any = self.fp
        self.fp = io.BufferedReader(_Reads(plain.detach(), sock))


class _Connection(HTTPConnection):
    """A connection on which nothing takes longer than the limit of whoever uses it, whatever the
    server does. Only names are looked up as the resolver sees fit."""

    response_class = _Response

    def _new_conn(self) -> socket.socket:
        limit = time_limit.current()
        self.timeout = min(cast("float", self.timeout), limit.left())
        made = super()._new_conn()
        # For what follows before the first byte of ours: a handshake.
        made.settimeout(min(self.timeout, limit.left()))
        return made

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        whole = memoryview(data)
        for at in range(0, len(whole), SLICE):
            with _waiting(self.sock, READ_TIMEOUT, time_limit.current()):
                super().send(whole[at : at + SLICE])


class _SecureConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Pools(urllib3.PoolManager):
    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


class _Retry(urllib3.Retry):
    """No pause goes beyond the limit, and nothing is tried again after it."""

    def get_backoff_time(self) -> float:
        return min(super().get_backoff_time(), time_limit.current().left())


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))


class _Source:
    """An iterable of blocks, read as the client reads files."""

    def __init__(self, blocks: Iterable[bytes]):
        self._blocks = iter(blocks)
        self._rest = b""
        self.size = 0
        self.error: BaseException | None = None

    def read(self, most: int) -> bytes:
        found = [self._rest] if self._rest else []
        length = len(self._rest)
        while length < most:
            try:
                block = next(self._blocks)
            except StopIteration:
                break
            except BaseException as error:
                self.error = error
                raise
            found.append(block)
            length += len(block)
        whole = b"".join(found)
        whole, self._rest = whole[:most], whole[most:]
        self.size += len(whole)
        return whole


class _Body:
    """The blocks of a response. Its connection goes back when it has been read, or closed."""

    def __init__(self, response: Any):
        self._response = response
        told = response.headers.get("Content-Length")
        self._left = int(told) if told is not None else None

    def __iter__(self) -> _Body:
        return self

    def __next__(self) -> bytes:
        try:
            with _translated("read"):
                block: bytes = self._response.read(BLOCK, decode_content=False)
                if self._left is not None:
                    self._left -= len(block)
                    if not block and self._left:
                        raise Unavailable("the object store ended in the middle of an object")
        except BaseException:
            self.close()
            raise
        if not block:
            self._response.release_conn()
            raise StopIteration
        return block

    def close(self) -> None:
        self._response.close()
        self._response.release_conn()


@contextmanager
def _translated(verb: str) -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if meaning := _MEANING.get(error.code or ""):
            raise meaning("the object is no longer kept") from None
        raise Unavailable(
            f"the object store refused to {verb}: {error.code}", retry_after=1
        ) from error
    except (MinioException, HTTPError, ParseError, OSError, UnicodeError) as error:
        raise Unavailable(f"the object store failed to {verb}", retry_after=1) from error
