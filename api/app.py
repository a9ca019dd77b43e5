"""The HTTP application around a running `AsyncLLM`; who started that closes it."""

from fastapi import FastAPI

from api.body_limit import BodyLimit
from api.errors import install_error_handlers
from api.gateway.keys import KeyCheck, KeyFile
from api.host_check import LOOPBACK, HostCheck
from api.metrics import Metrics
from api.openapi import ERRORS, Application
from api.request_log import RequestLog
from api.routes import chat, completions, embeddings, health, metrics, models, responses, tokens
from api.state import AppState
from vlm_serve import __version__
from vlm_serve.config import ServerConfig
from vlm_serve.serving.async_llm import AsyncLLM


def create_app(llm: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The routes over `llm`, within the limits of `config`. No page of documentation: it would load from a CDN.

    Raises:
        ConfigurationError: the file of keys is not a sound one.
    """
    keys = KeyFile.read(config.api_keys) if config.api_keys is not None else None
    figures = Metrics(
        stats=lambda: llm.stats,
        restarts=lambda: llm.engine_restarts,
        model_name=llm.models[0].id,
        adapter_slots=llm.adapter_slots,
        tenants=keys.tenants if keys else (),
    )
    llm.on_step(figures.step)
    llm.on_image(figures.image)
    llm.on_adapters(figures.adapters_loaded)
    app = Application(title="vlm-serve", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.shared = AppState(llm, config, figures)
    install_error_handlers(app)
    for route in (chat, completions, responses, embeddings, tokens, models, health, metrics):
        app.include_router(route.router)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if keys is not None:
        app.add_middleware(KeyCheck, keys=keys)
    if config.host in LOOPBACK:
        app.add_middleware(HostCheck)
    app.add_middleware(RequestLog)  # added last: the outermost
    return app
