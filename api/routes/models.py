"""`GET /v1/models`: the base model and its adapters."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.responses import model_json
from api.state import AppState, app_state
from vlm_serve.errors import ModelNotFoundError
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import JsonObject

router = APIRouter()


def _entry(model: ServedModel, state: AppState) -> JsonObject:
    return model_json(model, state.config, state.llm.decode_limits)


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def list_models(state: Annotated[AppState, Depends(app_state)]) -> JsonObject:
    return {"object": "list", "data": [_entry(model, state) for model in state.llm.models]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, state: Annotated[AppState, Depends(app_state)]) -> JsonObject:
    for model in state.llm.models:
        if model.id == model_id:
            return _entry(model, state)
    raise ModelNotFoundError("There is no model of that name; /v1/models lists those there are.", param="model")
