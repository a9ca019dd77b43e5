"""From a conversation to a prompt: files decoded in the pool, pixels processed, text tokenised."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.config import IngestConfig
from vlm_serve.families.base import ModelFamily, Prompt
from vlm_serve.serving.decode_pool import DecodePool
from vlm_serve.types import ChatInput, ImageInputs, ImagePart


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt for the engine, and the receipts of its images in order."""

    prompt: Prompt
    receipts: tuple[ImageReceipt, ...] = ()


class Ingest:
    """Prepares conversations for one model. Thread-safe; each call blocks until its images are decoded."""

    def __init__(self, family: ModelFamily, config: IngestConfig) -> None:
        self._family = family
        self._pool = DecodePool(config)
        self._pool.start()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="ingest")

    def prepare(self, chat: ChatInput) -> PreparedPrompt:
        """Decodes and processes the images and renders the chat template.

        Raises:
            ImageError: a file cannot be used.
            InvalidRequestError: the conversation does not fit the model's template.
        """
        images = list(self._threads.map(self._process, chat.images))
        prompt = self._family.render_chat(chat, [inputs for inputs, _ in images])
        return PreparedPrompt(prompt, tuple(receipt for _, receipt in images))

    def prepare_text(self, text: str) -> PreparedPrompt:
        """A plain prompt, without a chat template."""
        return PreparedPrompt(self._family.encode_text(text))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()

    def _process(self, part: ImagePart) -> tuple[ImageInputs, ImageReceipt]:
        image = self._pool.decode(part)
        return self._family.process_image(image), image.receipt
