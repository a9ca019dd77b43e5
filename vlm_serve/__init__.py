"""vlm-serve: clinical vision-language models, served from DICOM to a streamed answer.

The package's face is three names, loaded when first asked for, so that `vlm_serve.clinical` can be imported
by a small process without torch:

    from vlm_serve import LLM, SamplingParams, StructuredOutputs
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_serve.serving.llm import LLM
    from vlm_serve.types import SamplingParams, StructuredOutputs

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutputs", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vlm_serve.serving.llm import LLM

        return LLM
    if name in ("SamplingParams", "StructuredOutputs"):
        from vlm_serve import types

        return getattr(types, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
