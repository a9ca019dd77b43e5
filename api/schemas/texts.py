"""`POST /v1/embeddings`, `/tokenize` and `/detokenize`."""

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from api.schemas.chat import Messages, TemplateKwargs, Tools, check_continuation
from api.schemas.completions import Prompts
from api.schemas.fields import Count, Integer, ModelName, RequestId, TokenId, WireModel


class EmbeddingRequest(WireModel):
    """OpenAI's fields. `dimensions` may only say what the model gives."""

    IGNORED = frozenset({"user"})

    model: ModelName
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    priority: Literal["stat", "routine"] | Integer | None = None
    request_id: RequestId | None = None


class TokenizeRequest(WireModel):
    """vLLM's: a `prompt`, or `messages` with what shapes their template."""

    model: ModelName | None = None
    prompt: StrictStr | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool | None = None

    @model_validator(mode="before")
    @classmethod
    def _special_tokens_are_the_models(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("add_special_tokens") not in (None, "messages" not in value):
            raise ValueError(
                "'add_special_tokens' is true for a prompt and false for messages, whose template adds them."
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("'prompt' or 'messages', one of them, is needed.")
        check_continuation(self.add_generation_prompt, self.continue_final_message)
        return self


class DetokenizeRequest(WireModel):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]
