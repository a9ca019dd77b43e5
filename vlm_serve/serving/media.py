"""Prompts and content parts as users write them, online and offline, into the engine's nouns.

Base64 is decoded and a URL's scheme is judged here; what the bytes are is found out by the decode worker.
"""

import binascii
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, TextPart, ToolCall

DICOM = "application/dicom"
SNIFF = "application/octet-stream"
MEDIA_TYPES = (DICOM, "image/png", "image/jpeg")
"""What a data URL may declare itself to be."""

PromptInput = str | Mapping[str, Any]
"""A text, `{"prompt": text}` or `{"prompt_token_ids": ids}`, as vLLM takes them."""

_DATA_URL_HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w.+-]+=[\w.+-]+)*;base64", re.ASCII | re.IGNORECASE)
_MAX_HEAD = 256


def from_data_url(url: str, param: str) -> ImagePart:
    """The file inside `data:MEDIA-TYPE;base64,DATA`; `param` names the field in an error.

    Raises:
        InvalidRequestError: another scheme, a media type that is not served, or text that is not base64.
    """
    if url[:5].lower() != "data:":
        raise InvalidRequestError(
            "Remote images are not fetched. Send the file itself: data:image/png;base64,… or "
            "data:application/dicom;base64,…",
            param=param,
        )
    comma = url.find(",", 0, _MAX_HEAD)
    match = _DATA_URL_HEAD.fullmatch(url, 0, comma) if comma > 0 else None
    if match is None:
        raise InvalidRequestError("The data URL must read data:MEDIA-TYPE;base64,DATA.", param=param)
    media_type = match.group(1).lower()
    media_type = "image/jpeg" if media_type == "image/jpg" else media_type
    if media_type not in MEDIA_TYPES:
        raise InvalidRequestError(f"The media type must be one of {', '.join(MEDIA_TYPES)}.", param=param)
    return ImagePart(from_base64(url[comma + 1 :], param), media_type)


def from_base64(encoded: str, param: str) -> bytes:
    """Strict base64 to bytes; the line breaks that `base64 FILE` puts in are allowed.

    Raises:
        InvalidRequestError: it is not base64, or empty.
    """
    if "\n" in encoded:
        encoded = encoded.replace("\r", "").replace("\n", "")
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError:  # binascii.Error, or a character beyond ASCII
        raise InvalidRequestError("The data is not valid base64 (standard alphabet, padded).", param=param) from None
    if not data:
        raise InvalidRequestError("The file is empty.", param=param)
    return data


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> ChatInput:
    """A conversation as `LLM.chat` takes it: OpenAI's messages, whose parts may also be
    `{"type": "image", "image": PIL image, path or bytes}`.

    Raises:
        InvalidRequestError: names the part that cannot be read.
    """
    if not messages:
        raise InvalidRequestError("The conversation has no messages.", param="messages")
    chat = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError("A message must have a role and content.", param=f"messages[{index}]")
        content = message.get("content") or ()
        if isinstance(content, str):
            content = ({"type": "text", "text": content},)
        if not isinstance(content, Sequence):
            raise InvalidRequestError(
                "The content must be a text or a list of parts.", param=f"messages[{index}].content"
            )
        parts = tuple(_read_part(part, f"messages[{index}].content[{number}]") for number, part in enumerate(content))
        calls = tuple(_read_call(call, f"messages[{index}].tool_calls") for call in message.get("tool_calls") or ())
        chat.append(ChatMessage(str(message.get("role", "user")), parts, calls, message.get("tool_call_id")))
    return ChatInput(tuple(chat))


def read_prompts(prompts: object) -> list[str | tuple[int, ...]]:
    """One `PromptInput` or several, each as its text or its token ids.

    Raises:
        InvalidRequestError: one of them is neither.
    """
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping):
        return [_read_prompt(one) for one in prompts]
    return [_read_prompt(prompts)]


def _read_prompt(prompt: object) -> str | tuple[int, ...]:
    match prompt:
        case str(text):
            return text
        case {"prompt_token_ids": ids, **others} if not others and (found := _token_ids(ids)) is not None:
            return found
        case {"prompt": str(text), **others} if not others:
            return text
    raise InvalidRequestError(
        'A prompt must be a text, {"prompt": text} or {"prompt_token_ids": ids}. Images go into LLM.chat.',
        param="prompt",
    )


def _token_ids(ids: Any) -> tuple[int, ...] | None:
    """A sequence of whole numbers, Python's or numpy's, or an array or tensor of them; None for anything else."""
    found = ids.tolist() if isinstance(ids, np.ndarray | torch.Tensor) else ids
    if not isinstance(found, Sequence) or any(isinstance(t, bool) or not isinstance(t, Integral) for t in found):
        return None
    return tuple(int(token) for token in found)


def _read_call(call: Any, param: str) -> ToolCall:
    """A call as an answer has it; its arguments are JSON, or the object itself."""
    match call:
        case {"id": str(name), "function": {"name": str(function), "arguments": arguments}}:
            try:
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            except ValueError:
                arguments = None
            if isinstance(arguments, Mapping):
                return ToolCall(name, function, arguments)
    raise InvalidRequestError(
        "A tool call needs an id and a function with its name and its arguments, a JSON object.", param=param
    )


def _read_part(part: Mapping[str, Any], param: str) -> TextPart | ImagePart:
    match part:
        case {"type": "text", "text": str(text)}:
            return TextPart(text)
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return from_data_url(url, param)
        case {"type": "dicom", "dicom": {"data": str(data)}}:
            return ImagePart(from_base64(data, param), DICOM)
        case {"type": "image", "image": image}:
            return ImagePart(_read_image(image, param), SNIFF)
    raise InvalidRequestError(
        "A part must be of type text, image_url, dicom, or image with a PIL image, a path or bytes.", param=param
    )


def _read_image(image: Any, param: str) -> bytes:
    if isinstance(image, Image.Image):
        return _to_png(image, param)
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError:
            raise InvalidRequestError("The image file cannot be read. Check its path.", param=param) from None
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    raise InvalidRequestError("An image must be a PIL image, a path or bytes.", param=param)


def _to_png(image: Image.Image, param: str) -> bytes:
    """Without loss. What PNG cannot hold becomes RGB first; greys of more than 8 bits would be clipped in that."""
    if image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
        if image.mode.startswith(("I", "F")):
            raise InvalidRequestError(
                f"Greys of mode {image.mode} would be clipped. Window the image to 8 bits, or pass the DICOM file.",
                param=param,
            )
        image = image.convert("RGB")
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG")
    except OSError:  # a file behind it that was read only now, and breaks off
        raise InvalidRequestError("The image cannot be read to its end.", param=param) from None
    return buffer.getvalue()
