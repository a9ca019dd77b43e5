"""A model family: what makes a checkpoint folder a model that the engine can serve.

The API's process uses the processor's side (images, prompts), the engine's process the builder's side.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.digests import folder_digest
from vlm_serve.errors import CheckpointError, ContextLengthError
from vlm_serve.families.prompt import Prompt as Prompt
from vlm_serve.families.prompt import PromptRenderer
from vlm_serve.layers.loading import load_checkpoint
from vlm_serve.types import ChatInput, ImageInputs, TextPart

IDENTITY_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")
"""What the identity of a model is made of: weights, configs, tokenizer, template."""


class VisionLanguageModel(nn.Module):
    """The three parts of a model. `vision` takes pixel values `[B, 3, H, W]`, `projector` what it gives."""

    def __init__(self, vision: nn.Module, projector: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.decoder = decoder

    @torch.inference_mode()
    def encode_images(self, images: Sequence[ImageInputs]) -> list[torch.Tensor]:
        """Embeddings `[num_tokens, hidden_size]` of each image, in order; one forward for each shape of pixels."""
        weight = next(self.projector.parameters())
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(images):
            by_shape.setdefault(inputs.tensors["pixel_values"].shape, []).append(index)
        embeddings: dict[int, torch.Tensor] = {}
        for indices in by_shape.values():
            pixels = torch.stack([torch.as_tensor(images[index].tensors["pixel_values"]) for index in indices])
            encoded = self.projector(self.vision(pixels.to(weight.device, weight.dtype)))
            embeddings.update(zip(indices, encoded.unbind(), strict=True))
        return [embeddings[index] for index in range(len(images))]


class ModelFamily(ABC):
    """One served checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.json.

    Raises:
        CheckpointError: something in the folder is missing, inconsistent or not known.
    """

    decoder_config: DecoderConfig
    image_token_id: int
    max_tokens_per_image: int
    """Placeholders of the largest image."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.notice: str | None = config.get("notice")
        """What every answer must say about the model; None if there is nothing."""

    @classmethod
    @abstractmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family."""

    @abstractmethod
    def process_image(self, image: ClinicalImage) -> ImageInputs:
        """Pixels as the tower takes them, and the count of placeholders that follows."""

    @abstractmethod
    def rename(self, name: str) -> str | None:
        """A checkpoint's tensor name to the model's (`decoder.`, `vision.`, `projector.`); None: not needed."""

    @abstractmethod
    def build_vision(self) -> nn.Module:
        """The tower, its weights not loaded."""

    @abstractmethod
    def build_projector(self) -> nn.Module:
        """The projector, its weights not loaded."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, of the class that its config names."""
        return read_tokenizer(AutoTokenizer, self.folder)

    def default_template(self) -> str | None:
        """The chat template of a checkpoint that brings none; None: it cannot be served."""
        return None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read when it is first asked for: the engine's process never needs it."""
        return self.load_tokenizer()

    @cached_property
    def image_token(self) -> str:
        """The placeholder as text."""
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if not isinstance(token, str):
            raise CheckpointError(f"The tokenizer in {self.folder} has no token {self.image_token_id} for images.")
        return token

    @cached_property
    def prompts(self) -> PromptRenderer:
        """Tokenizer and template. A server asks for it at its start, so that what is wrong shows then."""
        template = read_chat_template(self.folder, self.tokenizer) or self.default_template()
        if template is None:
            raise CheckpointError(f"{self.folder} has no chat template. Add its chat_template.jinja.")
        highest = max(token for token in self.tokenizer.get_vocab().values() if token != self.image_token_id)
        if highest >= self.decoder_config.vocab_size:
            raise CheckpointError(
                f"The tokenizer in {self.folder} has token {highest}, but the decoder's vocabulary ends at "
                f"{self.decoder_config.vocab_size - 1}. Take both from the same checkpoint."
            )
        return PromptRenderer(self.tokenizer, template, self.image_token)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library, which streams answers as text."""
        return self.prompts.backend

    def render_chat(self, chat: ChatInput, images: Sequence[ImageInputs]) -> Prompt:
        """The conversation as token ids, with its cue for an answer; see `PromptRenderer.render`.

        Raises:
            ContextLengthError: it cannot fit, however it is tokenised.
        """
        texts = sum(len(part.text) for m in chat.messages for part in m.content if isinstance(part, TextPart))
        calls = sum(len(str(call.arguments)) for m in chat.messages for call in m.tool_calls)
        self._check_length(texts + calls + len(str(chat.tools)) + len(str(chat.template_kwargs)))
        return self.prompts.render(chat, images)

    def encode_text(self, text: str) -> Prompt:
        """A bare prompt; see `PromptRenderer.encode_text`.

        Raises:
            ContextLengthError: it cannot fit, however it is tokenised.
        """
        self._check_length(len(text))
        return self.prompts.encode_text(text)

    @cached_property
    def _most_characters(self) -> int:
        """More characters than this are more tokens than the decoder has positions."""
        return self.decoder_config.max_positions * max(len(token) for token in self.tokenizer.get_vocab())

    def _check_length(self, characters: int) -> None:
        """Before the tokenizer sees the text, which costs it seconds and gigabytes for some megabytes."""
        if characters > self._most_characters:
            raise ContextLengthError(
                f"The text has {characters} characters; the model's context holds {self.decoder_config.max_positions} "
                "tokens. Shorten it.",
                param="messages",
            )

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the generation config's, the config's and the tokenizer's."""
        found = {self.tokenizer.eos_token_id}
        generation = read_json(self.folder / "generation_config.json")
        for settings in (generation, self.config, self.config.get("text_config", {})):
            value = settings.get("eos_token_id")
            found.update(value if isinstance(value, list) else [value])
        return tuple(sorted(token for token in found if isinstance(token, int)))

    @cached_property
    def model_digest(self) -> str:
        """The identity of the checkpoint: sha256 over its files."""
        return folder_digest(self.folder, IDENTITY_FILES)

    def build(self, dtype: torch.dtype, device: torch.device) -> VisionLanguageModel:
        """The model with its weights, for inference.

        Raises:
            CheckpointError: the weights do not fit the config.
        """
        with uninitialized(dtype, device):
            model = VisionLanguageModel(self.build_vision(), self.build_projector(), Decoder(self.decoder_config))
        load_checkpoint(self.folder, model, self.rename)
        return model.requires_grad_(False).eval()


@contextmanager
def uninitialized(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Modules made inside have this dtype and device, and the memory of their weights is left as it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the first prefix that fits replaced; as it is if none does."""
    for prefix, ours in prefixes.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file.

    Raises:
        CheckpointError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON. Copy it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return content


def read_chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The checkpoint's own template, from whichever file holds it; None if none does."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def read_tokenizer(loader: type[AutoTokenizer | PreTrainedTokenizerFast], folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer, of the class that `loader` finds; nothing is fetched, none of the folder's code is run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        raise CheckpointError(f"{folder} has no tokenizer that can be read (tokenizer.json).") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
