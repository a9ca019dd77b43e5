"""A Llama decoder and its tokenizer out of a GGUF file: what the embedded default is made from.

transformers can open such a file, but loses the digit splitting of this tokenizer and takes the wrong token
for the end of an answer, so the file's own fields are read here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlm_serve.errors import CheckpointError
from vlm_serve.families.gguf_model import PARTS, TOP, to_halves

_SPECIAL = 3
"""`tokenizer.ggml.token_type` of a control token."""


class GgufLlama:
    """A GGUF file of architecture `llama` with tied word embeddings and a byte-level BPE tokenizer.

    Raises:
        CheckpointError: it is of another kind.
    """

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        found = {name: self._field(name) for name in ("general.architecture", "tokenizer.ggml.model")}
        if found != {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}:
            raise CheckpointError(f"{path.name} is not a Llama decoder with a byte-level BPE tokenizer.")

    @property
    def chat_template(self) -> str:
        return str(self._field("tokenizer.chat_template"))

    def config(self) -> dict[str, Any]:
        """Transformers' config of the decoder."""
        return {
            "model_type": "llama",
            "vocab_size": self._field("llama.vocab_size"),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": round(self._field("llama.attention.layer_norm_rms_epsilon"), 12),
            "rope_parameters": {"rope_type": "default", "rope_theta": self._field("llama.rope.freq_base")},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, dequantized to bfloat16, under the name it has in `LlamaForCausalLM`."""
        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        for tensor in self._reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            if (top := tensor.name.removesuffix(".weight")) in TOP:
                name = f"{TOP[top]}.weight"
            else:
                _, layer, part, kind = tensor.name.split(".")
                name = f"model.layers.{layer}.{PARTS[part]}.{kind}"
                if part in heads:
                    values = to_halves(values, self._field(heads[part]))
            # A copy: what the file holds unquantized is a read-only view of it.
            yield name, torch.from_numpy(np.array(values)).to(torch.bfloat16)

    def write_tokenizer(self, folder: Path, extra_special: str) -> int:
        """Writes `tokenizer.json` and its config, with one more special token past the vocabulary; returns its id."""
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        kinds: list[int] = self._field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*special, extra_special]])
        tokenizer.save(str(folder / "tokenizer.json"))
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        config: dict[str, Any] = {
            f"{role}_token": tokens[self._field(f"tokenizer.ggml.{field}_token_id")] for role, field in roles.items()
        }
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        token_id = tokenizer.token_to_id(extra_special)
        assert isinstance(token_id, int)
        return token_id

    def _field(self, name: str) -> Any:
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()
