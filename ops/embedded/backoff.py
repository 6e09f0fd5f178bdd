"""When to start a dead process again, and when to stop trying."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """The recent deaths of one process. Times and durations are seconds of one clock."""

    first: float = 0.5
    most: float = 10.0
    limit: int = 5
    window: float = 60.0
    deaths: list[float] = field(default_factory=list)

    def died(self, now: float) -> float | None:
        """The time to start it again; None when it has died `limit` times within `window`."""
        self.deaths = [death for death in self.deaths if now - death < self.window] + [now]
        if len(self.deaths) >= self.limit:
            return None
        return now + min(self.first * 2.0 ** (len(self.deaths) - 1), self.most)
