"""What is known of one request while it is served, kept in its ASGI scope."""

import time
from dataclasses import dataclass, field

from starlette.types import Scope

RECORD = "vlm_serve.record"


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request while it is served; `facts` are added by the route that learns them."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    facts: dict[str, str | int | float] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        """Seconds since the request's head was read."""
        return time.perf_counter() - self.started


def record_of(scope: Scope) -> RequestRecord:
    record: RequestRecord = scope[RECORD]
    return record
