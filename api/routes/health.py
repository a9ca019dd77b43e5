"""`GET /health` and `/ready`: whether the engine answers, and whether a chat would be answered now; `/version`."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.state import AppState, app_state
from vlm_serve import __version__
from vlm_serve.errors import EngineDeadError

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(state: Annotated[AppState, Depends(app_state)]) -> dict[str, str]:
    """Ask the engine's own loop, not only this process."""
    await state.llm.check_health()
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(state: Annotated[AppState, Depends(app_state)]) -> dict[str, str]:
    """Whether to send requests here: answered at once, also while a long step keeps the engine busy."""
    if not state.llm.is_ready:
        raise EngineDeadError("The engine is being started again. Try again in a moment.")
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}
