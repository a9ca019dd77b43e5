"""`GET /health`, 200 only when a chat could be answered now, and `GET /version`."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.state import AppState, app_state
from vlm_serve import __version__

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(state: Annotated[AppState, Depends(app_state)]) -> dict[str, str]:
    """Ask the engine's own loop, not only this process."""
    await state.llm.check_health()
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}
