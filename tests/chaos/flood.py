"""Requests as fast as they come, not as they are answered: what a crowd does, and clients that wait
for each other cannot."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(slots=True)
class Tally:
    """What became of the requests of one flood. Seconds."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    """0: no answer, or one past the deadline."""
    took: dict[int, list[float]] = field(default_factory=dict)
    """By status, from the request to its answer."""

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    @property
    def goodput(self) -> float:
        """Good answers a second."""
        return self.statuses[200] / self.seconds

    def percentile(self, status: int, share: float) -> float:
        times = sorted(self.took.get(status, ())) or [0.0]
        return times[min(len(times) - 1, int(share * len(times)))]

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{count:,} × {status or 'none in time'}"
            for status, count in sorted(self.statuses.items())
        )
        return (
            f"{self.sent / self.seconds:.0f} requests a second, {self.goodput:.0f} good ones,"
            f" p99 {self.percentile(200, 0.99):.2f} s: {kinds}"
        )


class Flood:
    """One kind of request, again and again, each good for `deadline` seconds."""

    def __init__(
        self, url: str, path: str, headers: Mapping[str, str], body: bytes, deadline: float
    ):
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 80)
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {address.netloc}",
            f"Content-Length: {len(body)}",
            f"Tidegate-Deadline: {deadline:g}",
            *(f"{name}: {text}" for name, text in headers.items()),
        ]
        self._request = "\r\n".join([*lines, "", ""]).encode() + body
        self._deadline = deadline

    def crowd(self, clients: int, seconds: float) -> Tally:
        """So many clients, each of which asks again when it was answered."""
        return asyncio.run(self._crowd(clients, seconds))

    def flow(self, rate: float, seconds: float) -> Tally:
        """So many requests a second, answered or not."""
        return asyncio.run(self._flow(rate, seconds))

    async def _crowd(self, clients: int, seconds: float) -> Tally:
        tally, idle = Tally(), list[Connection]()
        until = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                await self._ask(tally, idle)

        return await self._timed(tally, idle, [client() for _ in range(clients)])

    async def _flow(self, rate: float, seconds: float) -> Tally:
        tally, idle = Tally(), list[Connection]()
        began = time.monotonic()

        async def at(moment: float) -> None:
            await asyncio.sleep(began + moment - time.monotonic())
            await self._ask(tally, idle)

        return await self._timed(tally, idle, [at(n / rate) for n in range(int(rate * seconds))])

    async def _timed(self, tally: Tally, idle: list[Connection], asking: list[Any]) -> Tally:
        began = time.monotonic()
        await asyncio.gather(*asking)
        tally.seconds = time.monotonic() - began
        for _, writer in idle:
            writer.close()
        return tally

    async def _ask(self, tally: Tally, idle: list[Connection]) -> None:
        began = time.monotonic()
        try:
            # A moment more than it has, for a refusal to arrive.
            async with asyncio.timeout(self._deadline + 1):
                status = await self._once(idle)
        except (OSError, EOFError, TimeoutError):
            status = 0
        took = time.monotonic() - began
        if status == 200 and took > self._deadline:
            status = 0
        tally.statuses[status] += 1
        tally.took.setdefault(status, []).append(took)

    async def _once(self, idle: list[Connection]) -> int:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(*self._address)
        try:
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            idle.append((reader, writer))
        return int(head[9:12])


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
