"""One line of a batch: what the engine is to do for it, and the body that the API would answer it with."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from api.answers.base import Writer
from api.answers.chat import ChatWriter
from api.answers.completions import TextWriter
from api.answers.responses import ResponseWriter
from api.cli.batch_file import BatchLine
from api.gateway.keys import ANYONE
from api.intake import validated
from api.routes.embeddings import check_dimensions, embeddings_json
from api.schemas import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest
from api.schemas.completions import each_prompt
from api.schemas.fields import GenerationRequest
from api.tools import tool_calling
from api.wire import chat_input, name_field, priority, responses_input, sampling_params
from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.config import ServerConfig
from vlm_serve.errors import (
    InputError,
    InvalidRequestError,
    ModelNotFoundError,
    PayloadTooLargeError,
    RequestFailedError,
    VlmServeError,
)
from vlm_serve.serving.async_llm import Embedding
from vlm_serve.serving.llm import LLM, Job
from vlm_serve.serving.outputs import Answers, Pooled
from vlm_serve.serving.run import TokenDelta, Usage
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import JsonObject, TokenLogprobs

URLS = ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings")

Result = Answers | Pooled | VlmServeError
Write = Callable[[Sequence[Result]], JsonObject]


@dataclass(slots=True)
class BatchRequest:
    """One line under way: a job a prompt, and their results as they come. `place` names the field of an error as the
    line has it.
    """

    custom_id: str
    jobs: list[Job]
    write: Write
    place: Callable[[InputError], None] = lambda error: None
    results: dict[int, Result] = field(default_factory=dict)

    def take(self, place: int, result: Result) -> bool:
        """True once all results are there."""
        self.results[place] = result
        return len(self.results) == len(self.jobs)

    def body(self) -> JsonObject:
        """The answer's, once all results are there.

        Raises:
            VlmServeError: what is wrong with the request, or that a fault ended it.
        """
        results = [self.results[place] for place in range(len(self.jobs))]
        for result in results:
            if (error := _error(result)) is not None:
                if isinstance(error, InputError):
                    self.place(error)
                raise error
        return self.write(results)


def _error(result: Result) -> VlmServeError | None:
    if isinstance(result, VlmServeError):
        return result
    for answer in [result] if isinstance(result, Pooled) else result.answers:
        if answer.error is not None and answer.error_param is not None:
            return InvalidRequestError(answer.error, param=answer.error_param)
        if answer.error is not None:
            return RequestFailedError(answer.error)
    return None


def read_request(line: BatchLine, llm: LLM, config: ServerConfig) -> BatchRequest:
    """The line as the API takes it.

    Raises:
        InputError: what the API would answer to it.
    """
    if line.method != "POST":
        raise InvalidRequestError("The method must be POST.", param="method")
    body = bytes(line.body)
    if len(body) > config.max_body_bytes:
        raise PayloadTooLargeError(f"The body is larger than {config.max_body_bytes} bytes.")
    match line.url:
        case "/v1/chat/completions":
            request = _chat(line.custom_id, body, llm, config.max_images)
        case "/v1/responses":
            request = _response(line.custom_id, body, llm, config.max_images)
        case "/v1/completions":
            request = _completion(line.custom_id, body, llm)
        case "/v1/embeddings":
            request = _embedding(line.custom_id, body, llm)
        case _:
            raise InvalidRequestError(f"The url must be one of {', '.join(URLS)}.", param="url")
    for place, job in enumerate(request.jobs):
        job.key = (request, place)
    return request


def _chat(custom_id: str, body: bytes, llm: LLM, max_images: int) -> BatchRequest:
    asked = validated(ChatCompletionRequest, body)
    _check_no_stream(asked)
    model = _find(asked.model, llm)
    calling = tool_calling(asked, llm.tool_format)
    sampling = sampling_params(asked, calling.structured_outputs() if calling is not None else None)
    chat = chat_input(asked, max_images=max_images)

    def write(results: Sequence[Result]) -> JsonObject:
        runs = _runs(results, model, llm)
        return _written(ChatWriter(asked, calling, runs[0], llm.models[0], int(time.time())), results)

    jobs = [Job(chat, sampling, _adapter(model), priority(asked.priority, ANYONE))]
    return BatchRequest(custom_id, jobs, write, lambda error: name_field(error, asked))


def _response(custom_id: str, body: bytes, llm: LLM, max_images: int) -> BatchRequest:
    asked = validated(ResponsesRequest, body)
    _check_no_stream(asked)
    model, sampling = _find(asked.model, llm), sampling_params(asked)
    chat = responses_input(asked, max_images=max_images)

    def write(results: Sequence[Result]) -> JsonObject:
        (run,) = _runs(results, model, llm)
        return _written(ResponseWriter(asked, run, llm.models[0], int(time.time())), results)

    jobs = [Job(chat, sampling, _adapter(model), priority(asked.priority, ANYONE))]
    return BatchRequest(custom_id, jobs, write, lambda error: name_field(error, asked))


def _completion(custom_id: str, body: bytes, llm: LLM) -> BatchRequest:
    asked = validated(CompletionRequest, body)
    _check_no_stream(asked)
    model, sampling, prompts = _find(asked.model, llm), sampling_params(asked), each_prompt(asked.prompt)

    def write(results: Sequence[Result]) -> JsonObject:
        runs = _runs(results, model, llm)
        return _written(TextWriter(asked, prompts, runs, llm.models[0], int(time.time())), results)

    urgency = priority(asked.priority, ANYONE)
    jobs = [Job(prompt, sampling, _adapter(model), urgency) for prompt in prompts]
    return BatchRequest(custom_id, jobs, write, lambda error: name_field(error, asked))


def _embedding(custom_id: str, body: bytes, llm: LLM) -> BatchRequest:
    asked = validated(EmbeddingRequest, body)
    model = _find(asked.model, llm)

    def write(results: Sequence[Result]) -> JsonObject:
        embeddings = []
        for result in results:
            assert isinstance(result, Pooled)
            assert result.embedding is not None
            check_dimensions(asked, result.embedding)
            embeddings.append(Embedding(result.embedding, len(result.prompt_token_ids)))
        return embeddings_json(asked, embeddings, sum(one.prompt_tokens for one in embeddings))

    urgency = priority(asked.priority, ANYONE)
    jobs = [Job(prompt, None, _adapter(model), urgency) for prompt in each_prompt(asked.input)]
    return BatchRequest(custom_id, jobs, write, lambda error: name_field(error, asked))


def _check_no_stream(asked: GenerationRequest) -> None:
    if asked.stream:
        raise InvalidRequestError("A batch has no streams. Leave 'stream' out.", param="stream")


def _find(name: str, llm: LLM) -> ServedModel:
    for model in llm.models:
        if model.id == name:
            return model
    known = ", ".join(model.id for model in llm.models)
    raise ModelNotFoundError(f"There is no model of this name. Known: {known}.", param="model")


def _adapter(model: ServedModel) -> str | None:
    return None if model.parent is None else model.id


class _EndedRun:
    """One prompt's, as the writers of the API want to know it."""

    def __init__(self, answers: Answers, model: ServedModel, llm: LLM) -> None:
        self.request_id = uuid.uuid4().hex
        self.model = model
        self.receipts: tuple[ImageReceipt, ...] = answers.receipts
        self.image_digests: tuple[str, ...] = answers.image_digests
        self.prompt_token_ids: tuple[int, ...] = answers.prompt_token_ids
        self.prompt_tokens = len(answers.prompt_token_ids)
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = answers.prompt_logprobs
        self.token_bytes = llm.token_bytes.__getitem__
        self.hidden_ids = llm.token_bytes.special_ids if answers.sampling.skip_special_tokens else frozenset[int]()


def _runs(results: Sequence[Result], model: ServedModel, llm: LLM) -> list[_EndedRun]:
    return [_EndedRun(one, model, llm) for one in results if isinstance(one, Answers)]


def _written(writer: Writer, results: Sequence[Result]) -> JsonObject:
    """The whole body: each answer is one delta."""
    for number, one in enumerate(results):
        assert isinstance(one, Answers)
        usage = Usage(len(one.prompt_token_ids), one.num_tokens, one.cached_tokens)
        for index, answer in enumerate(one.answers):
            delta = TokenDelta(
                index=index,
                text=answer.text,
                token_ids=tuple(answer.token_ids),
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
                usage=usage,
                logprobs=tuple(answer.logprobs),
            )
            writer.accept(number, delta)
    return writer.whole()
