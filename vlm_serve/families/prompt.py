"""From a conversation to token ids: the chat template, the placeholders of images, and no forged special tokens.

A special token that a user types (`<image>`, `<|im_end|>`) stays plain text: it can neither be a placeholder
nor end a turn. Everything else is tokenised as transformers' `apply_chat_template` does it.
"""

import inspect
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm_serve.errors import CheckpointError, InvalidRequestError
from vlm_serve.types import ChatInput, ChatMessage, ImageInputs, ImagePieces, ImageSpan, TextPart

_ROLE = re.compile(r"[a-z][a-z_]{0,31}")
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Variables of a template that a caller's own may not replace."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine is given: the tokens, with `num_tokens` placeholders for each image, where they are, and how many
    tokens at the front see each other whichever comes first.
    """

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()
    both_ways_prefix: int = 0


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes a call of a function: `{"name": …, arguments_key: {…}}` between two marks."""

    begin: str
    end: str
    arguments_key: str


def tool_format(template: str) -> ToolFormat | None:
    """What a chat template tells the model of calls; None: it knows no tools.

    Those of Qwen and Hermes put `<tool_call>` around a call, Llama's have a bare object with `parameters`.
    """
    if not re.search(r"\btools\b", template):
        return None
    if "<tool_call>" in template:
        return ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")
    return ToolFormat("", "", "parameters" if '"parameters"' in template else "arguments")


class PromptRenderer:
    """One checkpoint's tokenizer and template.

    Args:
        tokenizer: a fast one, of the `tokenizers` library.
        template: Jinja, run by transformers in its immutable sandbox.
        image_token: the placeholder as text; None for a model without images.
        template_image: what the template writes for an image, where that is another text than the placeholder.

    Raises:
        CheckpointError: the tokenizer or the template cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        image_token: str | None,
        template_image: str | None = None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError("The checkpoint has no tokenizer.json. Save its tokenizer again with transformers 5.")
        self._tokenizer = tokenizer
        self._template = template
        self._image_token = image_token
        self._template_image = template_image or image_token
        self.image_token_id: int | None = None if image_token is None else backend.token_to_id(image_token)
        if image_token is not None and self.image_token_id is None:
            raise CheckpointError(f"The tokenizer does not know the image token {image_token!r} of config.json.")
        self._guarded = self._guarded_tokens(backend)
        # Copies of its own: no other user can switch truncation or padding on in them.
        self.backend = _copy(backend, without=())
        self._plain = _copy(backend, without=tuple(self._guarded))
        self._takes_parts = self._template_takes_parts()
        self.tool_format = tool_format(template)

    def render(self, chat: ChatInput, images: Sequence[ImagePieces]) -> Prompt:
        """The conversation with its cue for an answer, each image in its pieces, each placeholder expanded to the
        `num_tokens` of its inputs.

        Args:
            chat: at least one message.
            images: of `chat.images`, in their order.

        Raises:
            InvalidRequestError: the template does not take this conversation or knows no tools, its placeholders
                are not as many as the images, or a tool or a variable of the template holds a control token.
        """
        if not chat.messages:
            raise InvalidRequestError("The conversation has no messages.", param="messages")
        self._check_tools(chat)
        self._check_variables(chat.template_kwargs)
        hidden: dict[str, str] = {}
        messages = [self._message(message, hidden) for message in chat.messages]
        try:
            text = self._apply(
                messages,
                tools=[dict(tool) for tool in chat.tools] or None,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **chat.template_kwargs,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # Its own words may echo the conversation.
            raise InvalidRequestError(
                "The model's chat template does not take this conversation. Check the roles and their order: most "
                "templates want user and assistant in turns, with at most one system message at the front.",
                param="messages",
            ) from None
        inputs = [piece for pieces in images for piece in pieces if isinstance(piece, ImageInputs)]
        return self._expand(self._encode(self._place(text, images), hidden), inputs)

    def encode_text(self, text: str) -> Prompt:
        """A bare prompt, as the caller wrote it: special tokens in it count. With the image's placeholder in it,
        for which there can be no image here, it is plain text throughout.

        Raises:
            InvalidRequestError: it is empty.
        """
        token_ids = self.backend.encode(text).ids
        if self.image_token_id is not None and self.image_token_id in token_ids:
            token_ids = self._plain.encode(text).ids
        if not token_ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        return Prompt(tuple(token_ids))

    def _guarded_tokens(self, backend: Tokenizer) -> dict[str, int]:
        """Tokens that text of a user must not become: special ones, the placeholder, the template's marks."""
        added = backend.get_added_tokens_decoder()
        return {
            token.content: token_id
            for token_id, token in added.items()
            if token.special or token.content == self._image_token or token.content in self._template
        }

    def _message(self, message: ChatMessage, hidden: dict[str, str]) -> dict[str, Any]:
        """A message as templates take it. Text with a guarded token in it is replaced by a nonce, which
        `hidden` maps to the text.
        """
        if not _ROLE.fullmatch(message.role):
            raise InvalidRequestError("A role must be a word such as system, user or assistant.", param="messages")
        # All of a message's text is judged as one: templates put parts end to end.
        guard = self._holds_guarded("".join(part.text for part in message.content if isinstance(part, TextPart)))
        parts: list[dict[str, str]] = []
        for part in message.content:
            if not isinstance(part, TextPart):
                parts.append({"type": "image"})
                continue
            text = part.text
            if guard:
                nonce = secrets.token_hex(16)
                hidden[nonce] = text
                text = nonce
            parts.append({"type": "text", "text": text})
        rest: dict[str, Any] = {}
        if message.tool_calls:
            rest["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            rest["tool_call_id"] = message.tool_call_id
        if self._takes_parts and message.role != "tool":
            return {"role": message.role, "content": parts} | rest
        pieces = [part.get("text", f"{self._template_image}\n") for part in parts]
        return {"role": message.role, "content": "".join(pieces)} | rest

    def _check_tools(self, chat: ChatInput) -> None:
        calls = [call for message in chat.messages for call in message.tool_calls]
        if self.tool_format is None and (chat.tools or calls or any(one.role == "tool" for one in chat.messages)):
            raise InvalidRequestError(
                "This model's chat template knows no tools. Leave 'tools' and the messages about them out.",
                param="tools" if chat.tools else "messages",
            )
        self._refuse_guarded([dict(tool) for tool in chat.tools], "tools")
        self._refuse_guarded([[call.id, call.name, dict(call.arguments)] for call in calls], "messages")
        self._refuse_guarded([message.tool_call_id or "" for message in chat.messages], "messages")

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        if not _RESERVED.isdisjoint(variables):
            raise InvalidRequestError(
                "A variable of the chat template has the name of one that the server sets.",
                param="chat_template_kwargs",
            )
        self._refuse_guarded(dict(variables), "chat_template_kwargs")

    def _refuse_guarded(self, value: Any, param: str) -> None:
        """A template writes these as it likes, escaped or not: they are not spelled out, but refused."""
        text = "".join(_strings(value))
        if text and (self._holds_guarded(text) or self._holds_guarded("\n".join(_strings(value)))):
            raise InvalidRequestError(
                f"'{param}' holds a control token of this model, which cannot be written as text here.", param=param
            )

    def _holds_guarded(self, text: str) -> bool:
        """Whether tokenising the text could give a guarded token; a normalizer may fold letters into one."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        guarded_ids = set(self._guarded.values()) - {unknown}
        guarded = [*self._guarded] if self._template_image is None else [*self._guarded, self._template_image]
        return any(token in text for token in guarded) or not guarded_ids.isdisjoint(
            self.backend.encode(text, add_special_tokens=False).ids
        )

    def _apply(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        text = self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False, **variables)
        assert isinstance(text, str)
        return text

    def _encode(self, text: str, hidden: dict[str, str]) -> list[int]:
        bos = self._tokenizer.bos_token
        # As transformers' processors do: the tokenizer adds its `<s>` unless the template wrote it.
        adds_special = not (isinstance(bos, str) and text.startswith(bos))
        if not hidden:
            return self.backend.encode(text, add_special_tokens=adds_special).ids
        token_ids = self.backend.encode("", add_special_tokens=adds_special).ids
        for piece in re.split(f"({'|'.join(hidden)})", text):
            if piece in hidden:
                token_ids += self._encode_plain(hidden[piece])
            else:
                token_ids += self.backend.encode(piece, add_special_tokens=False).ids
        return token_ids

    def _encode_plain(self, text: str) -> list[int]:
        """Text whose guarded tokens are spelled out in ordinary ones."""
        token_ids = self._plain.encode(text, add_special_tokens=False).ids
        forbidden = set(self._guarded.values()) - {getattr(self._tokenizer, "unk_token_id", None)}
        if not forbidden.isdisjoint(token_ids):
            # A vocabulary that holds the whole word as an ordinary entry, too.
            raise InvalidRequestError(
                "The conversation holds a control token of this model, which cannot be written as text here.",
                param="messages",
            )
        return token_ids

    def _place(self, text: str, images: Sequence[ImagePieces]) -> str:
        """The template's text with the pieces of each image where it writes one, a placeholder for each inputs."""
        between = [text] if self._template_image is None else text.split(self._template_image)
        _check_count(len(images), len(between) - 1)
        placed = [between[0]]
        for pieces, after in zip(images, between[1:], strict=True):
            placed += [piece if isinstance(piece, str) else str(self._image_token) for piece in pieces]
            placed.append(after)
        return "".join(placed)

    def _expand(self, token_ids: list[int], images: Sequence[ImageInputs]) -> Prompt:
        placeholders = [i for i, token in enumerate(token_ids) if token == self.image_token_id]
        _check_count(len(images), len(placeholders))
        expanded: list[int] = []
        spans = []
        start = 0
        for position, inputs in zip(placeholders, images, strict=True):
            expanded += token_ids[start:position]
            spans.append(ImageSpan(len(expanded), inputs))
            expanded += [token_ids[position]] * inputs.num_tokens
            start = position + 1
        return Prompt((*expanded, *token_ids[start:]), tuple(spans))

    def _template_takes_parts(self) -> bool:
        """Whether the template walks a message's parts, or wants its content as one string."""
        probe = secrets.token_hex(8)
        parts = [{"type": "text", "text": probe}]
        if self._image_token is not None:
            parts.insert(0, {"type": "image"})
        try:
            text = self._apply([{"role": "user", "content": parts}])
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return False
        shown = 0 if self._template_image is None else text.count(self._template_image)
        return text.count(probe) == 1 and "'type'" not in text and shown == (self._image_token is not None)


def _check_count(images: int, shown: int) -> None:
    if images != shown:
        raise InvalidRequestError(
            f"The conversation has {images} image(s) where the model's chat template shows {shown}. Put images into "
            "user messages.",
            param="messages",
        )


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names included, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _copy(backend: Tokenizer, without: Sequence[str]) -> Tokenizer:
    """The same tokenizer without truncation, padding and the power of some added tokens over text."""
    content = json.loads(backend.to_str())
    content["truncation"] = content["padding"] = None
    added = content["added_tokens"]
    vocabulary = Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    kept = []
    for token in added:
        if token["content"] not in without:
            kept.append(token)
        elif vocabulary.token_to_id(token["content"]) is None:
            # Ids past the vocabulary are counted through: the place is kept, under a name that nobody can type.
            kept.append(token | {"content": secrets.token_hex(32)})
    content["added_tokens"] = kept
    copy = Tokenizer.from_str(json.dumps(content))
    for token in added:
        if token["content"] not in without and copy.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(f"The tokenizer's added token {token['content']!r} has an id out of order.")
    return copy
