"""From a conversation to a prompt: files decoded in the pool, pixels processed, text tokenised."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.config import IngestConfig
from vlm_serve.errors import ImageError
from vlm_serve.families.base import ModelFamily, Prompt
from vlm_serve.serving.decode_pool import DecodePool
from vlm_serve.types import ChatInput, ImageInputs, ImagePart


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt for the engine, and the receipts of its images in order."""

    prompt: Prompt
    receipts: tuple[ImageReceipt, ...] = ()


class Ingest:
    """Prepares conversations for one model, for one event loop or for any thread.

    Raises, from each `prepare`:
        ImageError: a file cannot be used; `param` says which.
        InvalidRequestError: the conversation does not fit the model's template.
    """

    def __init__(self, family: ModelFamily, config: IngestConfig) -> None:
        self._family = family
        self._workers = config.workers
        self._pool = DecodePool(config)
        self._pool.start()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="ingest")

    def prepare(self, chat: ChatInput) -> PreparedPrompt:
        """Blocks until the images are decoded and processed and the chat template is rendered."""
        return self._render(chat, list(self._threads.map(self._process, chat.images)))

    async def prepare_async(self, chat: ChatInput) -> PreparedPrompt:
        """The same without blocking. A request with many images takes turns with others; one that is
        cancelled leaves behind only the files that are being decoded at that moment.
        """
        loop = asyncio.get_running_loop()
        own_share = asyncio.Semaphore(self._workers)

        async def process(image: tuple[str, ImagePart]) -> tuple[ImageInputs, ImageReceipt]:
            async with own_share:
                return await loop.run_in_executor(self._threads, self._process, image)

        tasks = [asyncio.create_task(process(image)) for image in chat.images]
        try:
            images = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return await asyncio.to_thread(self._render, chat, images)

    def prepare_text(self, text: str) -> PreparedPrompt:
        """A plain prompt, without a chat template."""
        return PreparedPrompt(self._family.encode_text(text))

    def close(self) -> None:
        """Ends the workers; what they were decoding fails."""
        self._pool.close()
        self._threads.shutdown(cancel_futures=True)

    def _process(self, image: tuple[str, ImagePart]) -> tuple[ImageInputs, ImageReceipt]:
        place, part = image
        try:
            decoded = self._pool.decode(part)
        except ImageError as error:
            error.param = place
            raise
        return self._family.process_image(decoded), decoded.receipt

    def _render(self, chat: ChatInput, images: list[tuple[ImageInputs, ImageReceipt]]) -> PreparedPrompt:
        prompt = self._family.render_chat(chat, [inputs for inputs, _ in images])
        return PreparedPrompt(prompt, tuple(receipt for _, receipt in images))
