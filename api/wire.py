"""From the wire to the engine's nouns: a checked request becomes a `ChatInput` and `SamplingParams`."""

from api.schemas import ChatCompletionRequest, DicomContent, ImageUrlContent, TextContent
from vlm_serve.errors import InvalidRequestError
from vlm_serve.serving.media import DICOM, from_base64, from_data_url
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, SamplingParams, TextPart


def sampling_params(request: ChatCompletionRequest) -> SamplingParams:
    """OpenAI's defaults: temperature 1, as many tokens as the context holds.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    return SamplingParams(
        max_tokens=request.token_limit,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=0 if request.top_k is None else request.top_k,
        seed=request.seed,
        stop=request.stop,
        ignore_eos=bool(request.ignore_eos),
    )


def chat_input(request: ChatCompletionRequest, *, max_images: int) -> ChatInput:
    """The conversation with its files as bytes.

    Raises:
        InvalidRequestError: too many images, an image outside a user's message, a message without content,
            or a file that is not sent as base64 under a media type that is served.
    """
    images = 0
    messages = []
    for index, message in enumerate(request.messages):
        parts: list[TextPart | ImagePart] = []
        for number, part in enumerate(message.content):
            param = f"messages[{index}].content[{number}]"
            if isinstance(part, TextContent):
                parts.append(TextPart(part.text))
                continue
            if message.role != "user":
                raise InvalidRequestError("An image belongs in a message of the user.", param=param)
            images += 1
            if images > max_images:
                raise InvalidRequestError(f"At most {max_images} images are allowed in a request.", param="messages")
            parts.append(_image_part(part, param))
        if not parts and message.role != "assistant":
            raise InvalidRequestError(f"A {message.role} message needs content.", param=f"messages[{index}].content")
        messages.append(ChatMessage("system" if message.role == "developer" else message.role, tuple(parts)))
    return ChatInput(tuple(messages))


def _image_part(part: ImageUrlContent | DicomContent, param: str) -> ImagePart:
    if isinstance(part, DicomContent):
        return ImagePart(from_base64(part.dicom.data, f"{param}.dicom.data"), DICOM)
    return from_data_url(part.image_url.url, f"{param}.image_url.url")
