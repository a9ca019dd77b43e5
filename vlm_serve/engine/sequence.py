"""A request's run through the engine: what is computed, what is generated, what it holds."""

import secrets
from dataclasses import dataclass, field

from vlm_serve.engine.batch import ImageKey
from vlm_serve.types import FinishReason, ImageSpan, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable side of a `Request`.

    `computed` tokens have their keys and values in the cache; `token_ids` are the prompt and the answer so
    far. `row` is its place in the batch while it runs. `block_hashes` grows with the full blocks of
    `token_ids` and never changes; `block_table` is what it holds of the cache now. A suspect was in a step
    that failed and has to pass one alone.
    """

    request: Request
    max_tokens: int
    token_ids: list[int]
    draw: int
    row: int | None = None
    adapter_slot: int | None = None
    computed: int = 0
    cached_tokens: int | None = None
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    pinned_images: set[ImageKey] = field(default_factory=set)
    is_suspect: bool = False
    finish_reason: FinishReason | None = None

    @classmethod
    def create(cls, request: Request, max_tokens: int) -> "Sequence":
        seed = request.sampling.seed
        draw = secrets.randbits(64) if seed is None else seed % 2**64
        return cls(request, max_tokens, list(request.token_ids), draw)

    @property
    def prompt_len(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.token_ids) - self.computed

    def image_key(self, span: ImageSpan) -> ImageKey:
        return span.inputs.digest, self.request.cache_salt

    def append(self, token_id: int) -> None:
        """Adds a generated token and says by `finish_reason` whether it was the last.

        An end-of-sequence token ends the answer and is part of its tokens; the detokenizer leaves it out
        of the text.
        """
        self.token_ids.append(token_id)
        if not self.request.sampling.ignore_eos and token_id in self.request.eos_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_generated >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
