"""`GET /metrics`: what Prometheus scrapes."""

import asyncio
import contextlib
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.gateway.keys import identity_of
from api.state import AppState, app_state
from vlm_serve.errors import EngineDeadError, PermissionDeniedError

router = APIRouter()

PATIENCE = 1.0
"""Seconds for the engine's answer; a scrape waits for 10 at most, and an idle engine answers at once."""


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request, state: Annotated[AppState, Depends(app_state)]) -> Response:
    """The figures of all tenants: with a file of keys, for a key that may read them."""
    if not identity_of(request.scope).metrics:
        raise PermissionDeniedError("This key may not read the figures of all tenants.")
    # The engine's figures come with its outputs; an idle engine has to be asked, and one that is busy or dead says
    # nothing new.
    with contextlib.suppress(EngineDeadError, TimeoutError):
        await asyncio.wait_for(state.llm.check_health(), PATIENCE)
    return Response(state.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})
