"""A model family: what makes a checkpoint folder a model that the engine can serve.

The API's process uses the processor's side (images, prompts), the engine's process the builder's side.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_backends import TorchvisionBackend
from transformers.initialization import no_init_weights

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.decoders.names import split_merged
from vlm_serve.digests import folder_digest
from vlm_serve.encoders.graphs import BucketGraphs, Capture
from vlm_serve.errors import CheckpointError, ConfigurationError, ContextLengthError, InvalidRequestError
from vlm_serve.families.prompt import Prompt as Prompt
from vlm_serve.families.prompt import PromptRenderer
from vlm_serve.families.sentencepiece import sentencepiece_tokenizer
from vlm_serve.layers.loading import Tell, differ, load_checkpoint
from vlm_serve.layers.quantization import Quantization
from vlm_serve.layers.tower_linear import TowerAdapter
from vlm_serve.types import ChatInput, ImageInputs, ImagePieces, TextPart

IDENTITY_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")
"""What the identity of a model is made of: weights, configs, tokenizer, template."""


class VisionLanguageModel(nn.Module):
    """The three parts of a model. `vision` takes pixel values `[B, 3, H, W]`, `projector` what it gives; a model of
    text alone has neither. `tower_adapter` says with whose adapter `encode_images` encodes.
    """

    def __init__(self, vision: nn.Module | None, projector: nn.Module | None, decoder: Decoder) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.decoder = decoder
        self.tower_adapter = TowerAdapter()
        self._graphs: BucketGraphs | None = None

    def record_graphs(self, capture: Capture) -> None:
        """From now on a few images at once are encoded by recorded forwards, where tower and projector are two: all but
        those whose work follows the sizes of the images.
        """
        if self.projector is not None:
            self._graphs = BucketGraphs(self._embed_pixels, capture)

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tower and projector: `[B, 3, H, W]` -> `[B, tokens, hidden_size]`. Recorded forwards have no adapter."""
        if self._graphs is None or self.tower_adapter.slot is not None:
            return self._embed_pixels(pixels)
        return self._graphs(pixels)

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.vision is not None
        assert self.projector is not None
        return self.projector(self.vision(pixels))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode_images(self, images: Sequence[ImageInputs]) -> list[torch.Tensor]:
        """Embeddings `[num_tokens, hidden_size]` of each image, in order; one forward for each shape of pixels.

        Where the decoder has deepstack layers, their features follow the embedding: `[num_tokens, hidden_size * (1 +
        k)]`.
        """
        assert self.projector is not None
        weight = next(self.projector.parameters())
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(images):
            by_shape.setdefault(inputs.tensors["pixel_values"].shape, []).append(index)
        embeddings: dict[int, torch.Tensor] = {}
        for indices in by_shape.values():
            pixels = torch.stack([torch.as_tensor(images[index].tensors["pixel_values"]) for index in indices])
            encoded = self.embed_pixels(pixels.to(weight.device, weight.dtype))
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

    model_types: tuple[str, ...]
    """What `model_type` of a config.json names it."""
    decoder_config: DecoderConfig
    image_token_id: int | None = None
    """The placeholder; None for a model of text alone, which builds neither tower nor projector."""
    max_tokens_per_image: int = 0
    """Placeholders of the largest image, of all its inputs together."""
    attends_both_ways: bool = False
    """Whether image tokens see those after them, see `ImageInputs`."""

    @property
    def min_tokens_per_image(self) -> int:
        """Placeholders of the smallest image: as many as of the largest, unless a family says otherwise."""
        return self.max_tokens_per_image

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.quantization = Quantization.from_config(config)
        self.notice: str | None = config.get("notice")
        """What every answer must say about the model; None if there is nothing."""

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family."""
        return config.get("model_type") in cls.model_types

    @abstractmethod
    def rename(self, name: str) -> str | None:
        """A checkpoint's tensor name to the model's (`decoder.`, `vision.`, `projector.`); None: not needed."""

    def split(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """The model's own tensors in one that `rename` has named; several where checkpoints keep them merged."""
        return split_merged(self.decoder_config, name, tensor)

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """Pixels as the tower takes them, the count of placeholders that follows, and what the prompt says around them.

        Raises:
            InvalidRequestError: the model takes no images.
        """
        raise InvalidRequestError(
            f"This model ({self.config.get('model_type')}) takes text alone. Leave the images out.", param="messages"
        )

    def process_pixels_on(self, device: torch.device) -> None:
        """From now on pixels are resized and normalised there. On a GPU this rounds otherwise than on a CPU.

        Raises:
            ConfigurationError: the checkpoint's image processor computes on a CPU alone.
        """
        processor: Any = getattr(self, "_image_processor", None)
        is_torchs = isinstance(processor, TorchvisionBackend)
        if not is_torchs:
            raise ConfigurationError(
                f"The image processor of {self.folder} computes on a CPU alone. Leave image_processor_device out."
            )
        processor.device = device  # of all that is not said in a call, a processor takes its own attributes

    def build_vision(self) -> nn.Module | None:
        """The tower, its weights not loaded."""
        return None

    def build_projector(self) -> nn.Module | None:
        """The projector, its weights not loaded."""
        return None

    def assemble(self, vision: nn.Module | None, projector: nn.Module | None, decoder: Decoder) -> VisionLanguageModel:
        """The parts as one model. A family whose tower takes images in another way has a class of its own."""
        return VisionLanguageModel(vision, projector, decoder)

    def rope_positions(self, length: int, images: Sequence[tuple[int, tuple[int, ...]]]) -> np.ndarray | None:
        """The time, row and column by which each token of a prompt is rotated: int64 `[3, length]`. None: its place.

        Args:
            images: the offset and the grid of each, in order.
        """
        return None

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
    def image_token(self) -> str | None:
        """The placeholder as text; None for a model of text alone."""
        if self.image_token_id is None:
            return None
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if not isinstance(token, str):
            raise CheckpointError(f"The tokenizer in {self.folder} has no token {self.image_token_id} for images.")
        return token

    @property
    def template_image(self) -> str | None:
        """What the chat template writes for an image."""
        return self.image_token

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
        return PromptRenderer(self.tokenizer, template, self.image_token, self.template_image)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library, which streams answers as text."""
        return self.prompts.backend

    def render_chat(self, chat: ChatInput, images: Sequence[ImagePieces]) -> Prompt:
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

    def encode_ids(self, token_ids: Sequence[int]) -> Prompt:
        """A bare prompt, given as token ids."""
        return Prompt(tuple(token_ids))

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

    def untie_a_head_of_its_own(self) -> None:
        """Looks whether the files have a head that differs from the embeddings it is said to be tied to. transformers
        does not tie it, either: older configs do not say of all models that they are not.
        """
        head, embeddings = "decoder.lm_head.weight", "decoder.embed_tokens.weight"
        if self.decoder_config.tie_word_embeddings and differ(self.folder, self.rename, head, embeddings):
            self.decoder_config = replace(self.decoder_config, tie_word_embeddings=False)

    def build(self, dtype: torch.dtype, device: torch.device, tell: Tell = lambda what: None) -> VisionLanguageModel:
        """The model with its weights, for inference; `tell` as in `load_checkpoint`.

        Raises:
            CheckpointError: the weights do not fit the config.
        """
        self.untie_a_head_of_its_own()
        with uninitialized(dtype, device):
            model = self.assemble(self.build_vision(), self.build_projector(), Decoder(self.decoder_config))
        load_checkpoint(self.folder, model, self.rename, self.split, self.quantization, tell)
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
    sentencepiece = folder / "tokenizer.model"
    if sentencepiece.is_file() and not (folder / "tokenizer.json").is_file():
        settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        return sentencepiece_tokenizer(sentencepiece, settings, read_json(folder / "added_tokens.json"))
    try:
        tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read (tokenizer.json, or a tokenizer.model of SentencePiece's)."
        ) from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
