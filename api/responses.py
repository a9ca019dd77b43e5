"""What goes back: OpenAI's chat completion and its chunks, and `x_vlm_serve` beside them, never in `content`."""

from dataclasses import asdict, replace
from typing import Literal

import msgspec

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.serving.async_llm import ChatRun, ServedModel, Usage
from vlm_serve.types import FinishReason, JsonObject

DRAFT_NOTICE = "Draft for review by a qualified clinician. Not for diagnostic use."


def receipt_json(receipt: ImageReceipt) -> JsonObject:
    """A receipt as plain JSON types, names unchanged."""
    fields = asdict(replace(receipt, attributes={}))  # `attributes` may be a read-only view
    return fields | {"attributes": dict(receipt.attributes), "notes": list(receipt.notes)}


def model_json(model: ServedModel) -> JsonObject:
    """One entry of `/v1/models`."""
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "vlm-serve",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.max_model_len,
        "max_tokens_per_image": model.max_tokens_per_image,
        "digest": model.digest,
        "notice": model.notice,
    }


def usage_json(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def image_answer_json(run: ChatRun, base: ServedModel) -> JsonObject:
    """`x_vlm_serve`: what a reader of an answer to images must know, and what repeats it."""
    adapter = run.model if run.model.parent is not None else None
    notices = dict.fromkeys(model.notice for model in (base, run.model) if model.notice)
    return {
        "notice": DRAFT_NOTICE,
        "model_notice": " ".join(notices) or None,
        "images": [
            receipt_json(receipt) | {"digest": digest}
            for receipt, digest in zip(run.receipts, run.image_digests, strict=True)
        ],
        "model": {"id": base.id, "digest": base.digest},
        "adapter": {"id": adapter.id, "digest": adapter.digest} if adapter else None,
    }


class CompletionWriter:
    """Writes the answer of one run, whole or in chunks, all under one id."""

    def __init__(self, run: ChatRun, base: ServedModel, created: int, *, include_usage: bool) -> None:
        self._run = run
        self._include_usage = include_usage
        self._base = base
        self._created = created

    def _head(self, kind: Literal["chat.completion", "chat.completion.chunk"]) -> JsonObject:
        return {
            "id": f"chatcmpl-{self._run.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._run.model.id,
            "system_fingerprint": self._run.model.digest[:16],
        }

    def _image_answer(self) -> JsonObject:
        return {"x_vlm_serve": image_answer_json(self._run, self._base)} if self._run.receipts else {}

    def completion(self, text: str, reason: FinishReason, usage: Usage) -> JsonObject:
        """The whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason.value}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage_json(usage)} | self._image_answer()

    def first_chunk(self) -> JsonObject:
        """The role, and `x_vlm_serve` for a request with images; sent before the first token is known."""
        return self._chunk({"role": "assistant", "content": ""}, None) | self._image_answer()

    def text_chunk(self, text: str, reason: FinishReason | None) -> JsonObject:
        return self._chunk({"content": text} if text else {}, reason)

    def usage_chunk(self, usage: Usage) -> JsonObject:
        """The last chunk, without a choice, for `stream_options.include_usage`."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage_json(usage)}

    def _chunk(self, delta: JsonObject, reason: FinishReason | None) -> JsonObject:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason and reason.value}
        # As OpenAI has it: every chunk names the usage that only the last one knows.
        usage = {"usage": None} if self._include_usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | usage


def server_sent_event(data: JsonObject) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
