"""What bodies have in common: models, usage, and `x_vlm_serve` beside an answer, never in its content."""

from dataclasses import asdict, replace
from typing import Protocol

import msgspec

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.config import DecodeLimits, ServerConfig
from vlm_serve.serving.media import MEDIA_TYPES
from vlm_serve.serving.run import Usage
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import JsonObject, TokenLogprobs

DRAFT_NOTICE = "Draft for review by a qualified clinician. Not for diagnostic use."


class AnsweredRun(Protocol):
    """What a body says of the run that it answers: a server's `Run` under way, or one of a batch that has ended."""

    @property
    def request_id(self) -> str: ...
    @property
    def model(self) -> ServedModel: ...
    @property
    def receipts(self) -> tuple[ImageReceipt, ...]: ...
    @property
    def image_digests(self) -> tuple[str, ...]: ...
    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]: ...
    @property
    def hidden_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...


def receipt_json(receipt: ImageReceipt) -> JsonObject:
    """A receipt as plain JSON types, names unchanged."""
    fields = asdict(replace(receipt, attributes={}))  # `attributes` may be a read-only view
    return fields | {"attributes": dict(receipt.attributes), "notes": list(receipt.notes)}


def model_json(model: ServedModel, config: ServerConfig, limits: DecodeLimits) -> JsonObject:
    """One entry of `/v1/models`; `images` is null where the model takes none. A file comes in base64, in a body."""
    images = {
        "min_tokens": model.min_tokens_per_image,
        "max_tokens": model.max_tokens_per_image,
        "max_images": config.max_images,
        "max_file_bytes": min(limits.max_file_bytes, config.max_body_bytes // 4 * 3),
        "max_dimension": limits.max_dimension,
        "media_types": list(MEDIA_TYPES),
    }
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "vlm-serve",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.max_model_len,
        "max_tokens_per_image": model.max_tokens_per_image,
        "dtype": model.dtype,
        "images": images if model.max_tokens_per_image else None,
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


def image_answer_json(run: AnsweredRun, base: ServedModel) -> JsonObject:
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


def server_sent_event(data: JsonObject) -> bytes:
    """One event; one with a type of its own is sent under its name."""
    name = f"event: {data['type']}\n".encode() if "type" in data else b""
    return name + b"data: " + msgspec.json.encode(data) + b"\n\n"
