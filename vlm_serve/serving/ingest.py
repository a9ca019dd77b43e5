"""From a conversation to a request for the engine: files decoded in the pool, pixels processed, text tokenised, and
what the sampling parameters say in texts put into token ids. Serves `AsyncLLM` and `LLM`.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from vlm_serve.clinical.image import ClinicalImage, ImageReceipt
from vlm_serve.config import IngestConfig
from vlm_serve.engine.engine import choose_device
from vlm_serve.errors import CheckpointError, InputError, InvalidRequestError, UnsupportedImageError
from vlm_serve.families.base import ModelFamily, Prompt
from vlm_serve.serving.decode_pool import DecodePool
from vlm_serve.serving.grammar_pool import GrammarPool
from vlm_serve.serving.grammar_worker import Vocabulary
from vlm_serve.types import ChatInput, ImageInputs, ImagePart, ImagePieces, Request, SamplingParams, image_digest

logger = logging.getLogger(__name__)

GRAMMAR_THREADS = 4
"""They wait for the one process that compiles."""

OnImage = Callable[[float, float], None]
"""Told of each image the seconds in which its file was decoded, and those in which its pixels were processed."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt for the engine, and the receipts and digests of its images in order. `continues` says that an answer
    goes on with its text; else it is a new message.
    """

    prompt: Prompt
    receipts: tuple[ImageReceipt, ...] = ()
    image_digests: tuple[str, ...] = ()
    continues: bool = False


_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers' processors raise where a picture, or their own settings, are not what they expect."""


class Ingest:
    """Prepares requests for one model, for one event loop or for any thread.

    Raises:
        CheckpointError: the checkpoint's image processor does not suit its tower.
        ConfigurationError: it cannot run on the device.

    Raises, from each `prepare`:
        ImageError: a file, or its picture, cannot be used; `param` says which.
        InvalidRequestError: the model takes no images, or the conversation does not fit its template.
    """

    def __init__(self, family: ModelFamily, config: IngestConfig) -> None:
        device = choose_device(config.image_processor_device)
        if family.image_token_id is not None:
            if device.type != "cpu":
                family.process_pixels_on(device)
            try:
                family.process_image(_TRIAL)  # what is wrong is told at the start, not to whoever sends an image
            except _FAULTS as error:
                raise CheckpointError(
                    f"The image processor of {family.folder} takes no picture ({type(error).__name__}). Take "
                    "preprocessor_config.json and processor_config.json from the same checkpoint as the weights."
                ) from None
        self._family = family
        self._workers = config.workers
        self.limits = config.limits
        self._pool = DecodePool(config)
        self._grammars = GrammarPool(self._vocabulary)
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")
        self._pool.start()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="ingest")
        self._on_image: list[OnImage] = []

    def on_image(self, callback: OnImage) -> None:
        """`callback` is told of every image from now on, on the thread that processed it."""
        self._on_image.append(callback)

    def prepare(self, chat: ChatInput) -> PreparedPrompt:
        """Blocks until the images are decoded and processed and the chat template is rendered."""
        return self._render(chat, list(self._threads.map(self._process, chat.images)))

    async def prepare_async(self, chat: ChatInput) -> PreparedPrompt:
        """The same without blocking. A request with many images takes turns with others; one that is
        cancelled leaves behind only the files that are being decoded at that moment.
        """
        loop = asyncio.get_running_loop()
        own_share = asyncio.Semaphore(self._workers)

        async def process(image: tuple[str, ImagePart]) -> tuple[ImagePieces, ImageReceipt]:
            async with own_share:
                return await loop.run_in_executor(self._threads, self._process, image)

        tasks = [asyncio.create_task(process(image)) for image in chat.images]
        try:
            images = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return await asyncio.to_thread(self._render, chat, images)

    def prepare_text(self, prompt: str | Sequence[int]) -> PreparedPrompt:
        """A plain prompt, without a chat template: as text, or as the token ids of one.

        Raises:
            InvalidRequestError: it is empty, an id is not of the vocabulary, or one is the placeholder of an image,
                which a plain prompt has not.
        """
        if isinstance(prompt, str):
            return PreparedPrompt(self._family.encode_text(prompt), continues=True)
        if not prompt:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        self._check_ids("prompt", prompt)
        if self._family.image_token_id in prompt:
            raise InvalidRequestError(
                f"Token {self._family.image_token_id} stands for an image, and a plain prompt has none. Send images in "
                "a chat.",
                param="prompt",
            )
        return PreparedPrompt(self._family.encode_ids(prompt), continues=True)

    def request(
        self,
        prepared: PreparedPrompt,
        sampling: SamplingParams,
        *,
        request_id: str,
        adapter: str | None = None,
        cache_salt: str = "",
        tenant: str = "",
        priority: int = 0,
        pooling: bool = False,
    ) -> Request:
        """The prompt as the engine takes it: cut to `truncate_prompt_tokens`, its `bad_words` in token ids, its
        `structured_outputs` compiled. It may block for as long as a schema takes.

        Raises:
            InvalidRequestError: the cut would lose an image, a token id is not of the vocabulary, or no answer can be
                of the schema.
        """
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            self._check_ids(name, tuple(getattr(sampling, name) or ()))
        prompt, spec = truncated(prepared.prompt, sampling.truncate_prompt_tokens), sampling.structured_outputs
        return Request(
            request_id=request_id,
            token_ids=prompt.token_ids,
            sampling=sampling,
            images=prompt.images,
            both_ways_prefix=prompt.both_ways_prefix,
            adapter=adapter,
            cache_salt=cache_salt,
            tenant=tenant,
            priority=priority,
            eos_token_ids=self._family.eos_token_ids,
            bad_word_ids=bad_word_ids(self._family.backend_tokenizer, tuple(sampling.bad_words or ())),
            grammar=None if spec is None else self._grammars.compile(spec, sampling.allowed_token_ids),
            pooling=pooling,
            continues=prepared.continues,
        )

    async def request_async(self, prepared: PreparedPrompt, sampling: SamplingParams, **fields: Any) -> Request:
        """As `request`, on a thread. Schemas have threads of their own: those that take long make only others wait."""
        threads = None if sampling.structured_outputs is None else self._grammar_threads
        work = partial(self.request, prepared, sampling, **fields)
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequestError: an id is not of the vocabulary.
        """
        self._check_ids("tokens", token_ids)
        return self._family.backend_tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def close(self) -> None:
        """Ends the workers; what they were decoding or compiling fails."""
        self._pool.close()
        self._grammars.close()
        self._threads.shutdown(cancel_futures=True)
        self._grammar_threads.shutdown(cancel_futures=True)

    def _vocabulary(self) -> Vocabulary:
        family = self._family
        size = family.decoder_config.vocab_size
        return Vocabulary(family.backend_tokenizer.to_str(), size, family.eos_token_ids)

    def _check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        size = self._family.decoder_config.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < size:
            raise InvalidRequestError(f"{param} must hold token ids from 0 to {size - 1}.", param=param)

    def _process(self, image: tuple[str, ImagePart]) -> tuple[ImagePieces, ImageReceipt]:
        place, part = image
        began = time.perf_counter()
        try:
            decoded = self._pool.decode(part)
            has_pixels = time.perf_counter()
            pieces = pieces_of(self._family, decoded)
        except InputError as error:
            error.param = place
            raise
        for told in self._on_image:
            told(has_pixels - began, time.perf_counter() - has_pixels)
        return pieces, decoded.receipt

    def _render(self, chat: ChatInput, images: list[tuple[ImagePieces, ImageReceipt]]) -> PreparedPrompt:
        prompt = self._family.render_chat(chat, [pieces for pieces, _ in images])
        receipts = tuple(receipt for _, receipt in images)
        digests = tuple(image_digest(pieces) for pieces, _ in images)
        return PreparedPrompt(prompt, receipts, digests, continues=chat.continue_final_message)


_TRIAL = ClinicalImage(np.zeros((64, 64, 3), np.uint8), ImageReceipt("image/png", "", "", 64, 64, "none"))
"""A black square."""


def pieces_of(family: ModelFamily, image: ClinicalImage) -> ImagePieces:
    """What the family makes of an image, its placeholders counted: the engine has room for so many and no more.

    Raises:
        InvalidRequestError: the model takes no images, or no image takes so many tokens in it.
        ImageError: the model's processor does not take the picture.
    """
    rows, columns = image.pixels.shape[:2]
    picture = f"a picture of {columns} by {rows} pixels"
    try:
        pieces = family.process_image(image)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # no fault of the picture's
    except (CheckpointError, *_FAULTS) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        # No text of the exception, and not the exception: it may echo what was sent, or name folders of the server.
        logger.error("An image is not processed: %s at %s:%d", type(error).__name__, place.name, place.lineno)
        raise UnsupportedImageError(
            f"The model's image processor does not take {picture}. Crop it, or send it in another size."
        ) from None
    count = sum(piece.num_tokens for piece in pieces if isinstance(piece, ImageInputs))
    if not 0 < count <= family.max_tokens_per_image:
        raise InvalidRequestError(
            f"The model's image processor counts {count} tokens for {picture}; the model has up to "
            f"{family.max_tokens_per_image} for an image. Crop it, or send it in another size."
        )
    return pieces


def truncated(prompt: Prompt, kept: int | None) -> Prompt:
    """The prompt's last `kept` tokens; all for None.

    Raises:
        InvalidRequestError: an image, or a part of one, is before them. An answer must not pass for one about an image
            that the model has not seen.
    """
    cut = 0 if kept is None else max(0, len(prompt.token_ids) - kept)
    if cut == 0:
        return prompt
    if prompt.images and prompt.images[0].offset < cut:
        least = len(prompt.token_ids) - prompt.images[0].offset
        raise InvalidRequestError(
            f"The last {kept} tokens of the prompt leave out an image or a part of one. Keep at least {least}, or send "
            "fewer images.",
            param="truncate_prompt_tokens",
        )
    return Prompt(
        prompt.token_ids[cut:],
        tuple(replace(span, offset=span.offset - cut) for span in prompt.images),
        max(0, prompt.both_ways_prefix - cut),
    )


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each word, at the start of a text and after a space, as vLLM has it."""
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    encoded = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    return tuple(dict.fromkeys(ids for ids in encoded if ids))
