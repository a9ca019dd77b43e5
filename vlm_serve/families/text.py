"""Models of text alone: whatever the decoder can be, from the Llamas to Falcon and the mixtures of experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_serve.decoders.config import KNOWN, DecoderConfig
from vlm_serve.decoders.names import text_name
from vlm_serve.families.base import ModelFamily
from vlm_serve.families.folder import read_config


class TextFamily(ModelFamily):
    """See `ModelFamily`."""

    model_types = tuple(name for name in KNOWN if not name.endswith("_vl_text"))  # those are parts of Qwen-VL's

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self.decoder_config = DecoderConfig.from_hf(read_config(folder).to_dict())

    def rename(self, name: str) -> str | None:
        return None if name.endswith("rotary_emb.inv_freq") else text_name(self.decoder_config.architecture, name)
