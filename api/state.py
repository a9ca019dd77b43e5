"""What the routes share, made once by `create_app`."""

from dataclasses import dataclass

from fastapi import Request

from api.metrics import Metrics
from vlm_serve.config import ServerConfig
from vlm_serve.serving.async_llm import AsyncLLM
from vlm_serve.serving.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class AppState:
    llm: AsyncLLM
    config: ServerConfig
    metrics: Metrics

    @property
    def base(self) -> ServedModel:
        return self.llm.models[0]


def app_state(request: Request) -> AppState:
    """The shared state, as a dependency of a route."""
    state: AppState = request.app.state.shared
    return state
