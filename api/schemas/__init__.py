"""The wire's models: what a request may say, checked before anything else sees it.

Three kinds of field. Supported ones are typed here. Those that OpenAI knows and that change nothing in an
answer are accepted; those that would change it and are not supported are an error that names them. Any
other field is an error too, so that a misspelt one never silently does nothing.
"""

from api.schemas.chat import ChatCompletionRequest as ChatCompletionRequest
from api.schemas.completions import CompletionRequest as CompletionRequest
from api.schemas.messages import DicomContent as DicomContent
from api.schemas.messages import ImageUrlContent as ImageUrlContent
from api.schemas.messages import TextContent as TextContent
from api.schemas.responses import ResponsesRequest as ResponsesRequest
from api.schemas.texts import DetokenizeRequest as DetokenizeRequest
from api.schemas.texts import EmbeddingRequest as EmbeddingRequest
from api.schemas.texts import TokenizeRequest as TokenizeRequest
