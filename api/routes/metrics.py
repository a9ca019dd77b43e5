"""`GET /metrics`: what Prometheus scrapes."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.state import AppState, app_state

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
async def metrics(state: Annotated[AppState, Depends(app_state)]) -> Response:
    return Response(state.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})
