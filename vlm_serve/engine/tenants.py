"""How much each tenant has been served, so that the next turn goes to the one that had least.

The virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588, section 4).
"""

from collections.abc import Iterable

PROMPT_WEIGHT = 1
GENERATED_WEIGHT = 2
"""What a token costs; one that is generated takes a step of its own. The paper's weights."""


class TokenCounters:
    """A counter a tenant, which only grows. Tenants are those of the server's key file: there are not many."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._last_to_leave: str | None = None

    def __getitem__(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    def charge(self, tenant: str, *, prompt: int = 0, generated: int = 0) -> None:
        """Counts tokens computed for a tenant: of prompts, and of answers."""
        self._served[tenant] = self[tenant] + PROMPT_WEIGHT * prompt + GENERATED_WEIGHT * generated

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        """A tenant of whom nothing waited comes back: to have been idle is no credit. Its counter is lifted to the
        least of those that wait or, if nobody does, to that of the last one who did.
        """
        floor = min((self[other] for other in waiting), default=self[self._last_to_leave or ""])
        self._served[tenant] = max(self[tenant], floor)

    def leave(self, tenant: str) -> None:
        """One of the tenant's sequences waits no more."""
        self._last_to_leave = tenant
