"""The document of the API against the server: whatever schemathesis makes of it, no answer is a 5xx."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from api.app import create_app
from api.routes import chat, completions, embeddings, health, metrics, models, responses, tokens
from tests.api.conftest import Served
from tests.api.running import as_is, running
from tests.api.scripted import BASE, HERMES, Asked, ScriptedLLM, ScriptedRun
from tests.checkpoints import VOCAB_SIZE, make_tokenizer
from vlm_serve.config import ServerConfig
from vlm_serve.engine.structured import Structures
from vlm_serve.serving.served_model import ServedModel

BOUNDED = settings(
    deadline=None,
    derandomize=True,  # the same cases in each run
    database=None,
    suppress_health_check=list(HealthCheck),
)
REFUSALS = {400, 401, 403, 404, 405, 413, 415, 422}
DOCUMENT = create_app(ScriptedLLM(), ServerConfig()).openapi()  # type: ignore[arg-type]
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [(path, method) for path, item in DOCUMENT["paths"].items() for method in item]
WITH_A_BODY = [(path, method) for path, method in OPERATIONS if method == "post"]


class AnyModel(ScriptedLLM):
    """Serves under every name, so that made-up requests come as far as an answer; what the answer is to match is
    compiled as for a real one.
    """

    structures = Structures(make_tokenizer().backend_tokenizer, VOCAB_SIZE, (2,))

    def reset(self) -> None:
        super().reset()
        self.tool_format = HERMES

    async def _admit(self, asked: Asked, model: str, images: int) -> ScriptedRun:
        if asked.sampling is not None and (spec := asked.sampling.structured_outputs) is not None:
            await asyncio.to_thread(self.structures.compile_grammar, spec)
        return await super()._admit(asked, model, images)

    def _find(self, model: str) -> ServedModel:
        return BASE


@pytest.fixture(scope="module")
def any_model() -> Iterator[str]:
    app = create_app(AnyModel(), ServerConfig())  # type: ignore[arg-type]
    with running(lambda: as_is(app)) as url:
        yield url


def fuzz(operation: tuple[str, str], url: str, kind: GenerationMode, examples: int, model: str | None = None) -> None:
    """Sends made-up requests of one operation.

    Args:
        kind: as the document has them, or not: those are refused.
        model: the one to ask for, for few tokens.
    """
    path, method = operation
    statuses: set[int] = set()

    @settings(BOUNDED, max_examples=examples)
    @given(case=SCHEMA[path][method].as_strategy(generation_mode=kind))
    def send(case: Any) -> None:
        if model is not None and isinstance(case.body, dict):
            case.body["model"] = model
            for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if limit in case.body:
                    case.body[limit] = 3
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        statuses.add(response.status_code)

    send()
    assert statuses
    if kind is GenerationMode.NEGATIVE:
        assert statuses <= REFUSALS


def test_the_document_has_every_endpoint() -> None:
    """But for the one that Prometheus reads, which takes nothing."""
    modules = (chat, completions, responses, embeddings, tokens, models, health, metrics)
    paths = {re.sub(":path", "", route.path) for module in modules for route in module.router.routes}  # type: ignore[attr-defined]
    assert paths - set(DOCUMENT["paths"]) == {"/metrics"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation[0])
def test_a_request_of_the_documents_kind_is_no_server_error(any_model: str, operation: tuple[str, str]) -> None:
    fuzz(operation, any_model, GenerationMode.POSITIVE, 20)


@pytest.mark.parametrize("operation", WITH_A_BODY, ids=lambda operation: operation[0])
def test_nor_is_one_of_another_kind_which_is_refused(any_model: str, operation: tuple[str, str]) -> None:
    fuzz(operation, any_model, GenerationMode.NEGATIVE, 10)


@pytest.mark.parametrize("operation", WITH_A_BODY, ids=lambda operation: operation[0])
def test_nor_is_one_that_reaches_a_real_model(served: Served, operation: tuple[str, str]) -> None:
    fuzz(operation, served.url, GenerationMode.POSITIVE, 5, model="tiny")
