"""What a GGUF file holds, as transformers has it: the config, and the tensors by name.

Both are read here and not by transformers' own reader: that one holds all of a model in memory, twice, and leaves out
what the files of Gemma 2 and 3, Phi-3 and Llama 3.1 say about their rotary embedding, attention and window.

| `general.architecture` | models | `model_type` |
|---|---|---|
| `llama` | Llama 2 and 3, Mistral, SmolLM2, Vicuna (not Mixtral) | `llama` |
| `qwen2` | Qwen2, Qwen2.5 | `qwen2` |
| `qwen3` | Qwen3 | `qwen3` |
| `qwen3moe` | Qwen3-MoE | `qwen3_moe` |
| `phi3` | Phi-3, Phi-4 mini | `phi3` |
| `gemma2` | Gemma 2 | `gemma2` |
| `gemma3` | the text of Gemma 3 and MedGemma | `gemma3_text` |
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from vlm_serve.config import MIB
from vlm_serve.errors import CheckpointError

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""`general.architecture` -> transformers' `model_type`."""

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The tensors of a block by transformers' names, as Llama has them."""

_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MORE_PARTS: dict[str, dict[str, str]] = {
    "qwen3": _QK_NORM,
    "qwen3moe": _QK_NORM | {"ffn_gate_inp": "mlp.gate"},
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | _QK_NORM,
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}

_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that are settings of the rotary embedding."""

_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}

_HARMLESS = {
    *("vocab_size", "attention.layer_norm_epsilon", "tensor_data_layout"),
    *("rope.scaling.finetuned", "rope.scaling.original_context_length"),
}
"""What a file may say that nothing asks for: it follows from the rest, or is of no use here."""

_SLIDE = ("phi3", "gemma2", "gemma3")

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Gemma's 27B alone scales its queries otherwise than by the size of a head; the file says neither."""

_DTYPES = {gguf.GGMLQuantizationType.F32: torch.float32, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
"""What holds a tensor of the file; float16 holds all others."""

_PIECE = 2 * MIB
"""Bytes of float32 that are dequantized at once: it takes several times as much."""

_CANNOT = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError)
"""What the reader of GGUF files raises where one is damaged."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a checkpoint; `pieces` gives its rows in order, on demand."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]


class GgufModel:
    """A text model in a GGUF file. Nothing of its weights is read before it is asked for.

    Raises:
        CheckpointError: the file is damaged, in several parts, or of a kind that is not served.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except _CANNOT:
            raise CheckpointError(f"{path.name} is damaged. Copy it again.") from None
        self._fields = reader.fields
        self._read: set[str] = set()
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.field("general.architecture"))
        if self.architecture not in MODEL_TYPES:
            raise CheckpointError(
                f"{path.name} holds a model of type {self.architecture!r}, which is not served from GGUF. Served are "
                f"{', '.join(MODEL_TYPES)}. Take the model's safetensors."
            )
        if (self.field("split.count") or 1) > 1:
            raise CheckpointError(f"{path.name} is one part of several. Join them with llama.cpp's gguf-split --merge.")
        if self.architecture == "llama" and self._own("expert_count"):
            raise self.refused("experts", "Mixtral")

    def field(self, name: str) -> Any:
        """What the file says under a name; None if nothing."""
        found = self._fields.get(name)
        try:
            return None if found is None else found.contents()
        except _CANNOT:
            raise CheckpointError(f"{self.path.name} is damaged at {name}. Copy it again.") from None

    def refused(self, what: str, found: object) -> CheckpointError:
        """The error for something of the model that is not read from GGUF."""
        return CheckpointError(
            f"{self.path.name} has {what} {found!r}, which is not read from GGUF. Take the model's safetensors."
        )

    def config(self) -> dict[str, Any]:
        """Transformers' config.

        Raises:
            CheckpointError: the file lacks something, or has what is not served.
        """
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self._own("attention.key_length") or hidden // heads
        if self.architecture == "llama":
            head_dim = self._own("rope.dimension_count") or head_dim
        if (value_dim := self._own("attention.value_length") or head_dim) != head_dim:
            raise self.refused("values of another size than keys,", value_dim)
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{self.path.name} has no word embeddings (token_embd.weight). Copy it again.")
        config: dict[str, Any] = {
            "model_type": MODEL_TYPES[self.architecture],
            "vocab_size": len(self._tensors["token_embd.weight"].data),
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._own("attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "attention_bias": self.architecture == "llama" and "blk.0.attn_q.bias" in self._tensors,
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "sliding_window": self._own("attention.sliding_window") if self.architecture in _SLIDE else None,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
        }
        if "original_max_position_embeddings" in config["rope_parameters"]:  # Phi-3's class takes it from there
            config |= {
                "original_max_position_embeddings": config["rope_parameters"]["original_max_position_embeddings"]
            }
        if self.architecture == "qwen3moe":
            config |= self._experts()
        if self.architecture in _LAYERS_OF_27B:
            config |= self._gemma(config)
        self._check_read(head_dim)
        return config

    def tensors(self) -> Iterator[GgufTensor]:
        """Every tensor under the name it has in transformers' model.

        Raises:
            CheckpointError: there are some whose names are not known.
        """
        unknown = []
        for name, tensor in self._tensors.items():
            if name in _FACTORS:
                continue
            named = self._named(name)
            if named is None:
                unknown.append(name)
                continue
            ours, part = named
            if part in _EXPERTS:
                for expert, matrix in enumerate(tensor.data):
                    whole = f"{ours.removesuffix('.weight')}.{expert}.{_EXPERTS[part]}.weight"
                    offset = tensor.data_offset + expert * matrix.nbytes
                    yield self._tensor(whole, matrix, offset, tensor.tensor_type, part)
            else:
                yield self._tensor(ours, tensor.data, tensor.data_offset, tensor.tensor_type, part)
        if unknown:
            raise self.refused("the tensors", ", ".join(unknown))

    def _named(self, name: str) -> tuple[str, str] | None:
        """Transformers' name of a tensor, and which part of its block it is; None: it is not known."""
        if match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
            return (f"{TOP[match[1]]}.{match[2]}", "") if match[1] in TOP else None
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        parts = PARTS | _MORE_PARTS.get(self.architecture, {})
        if self.architecture == "qwen3moe":
            parts |= dict.fromkeys(_EXPERTS, "mlp.experts")
        if match is None or match[2] not in parts:
            return None
        return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}", match[2]

    def _tensor(
        self, name: str, data: np.ndarray, place: int, kind: gguf.GGMLQuantizationType, part: str
    ) -> GgufTensor:
        """
        Args:
            data: as the reader maps it; blocks are rows of bytes.
            place: where it begins in the file.
            part: of its block.
        """
        dtype = _DTYPES.get(kind, torch.float16)
        if data.ndim == 1:
            shape: tuple[int, ...] = (len(data),)
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (len(data), data.shape[1] * data.itemsize // size * block)
        order = np.arange(shape[0])
        if self.architecture == "llama" and part in _HEADS:
            heads = self._own(_HEADS[part]) or self._number("attention.head_count")
            if shape[0] % (2 * heads):
                raise CheckpointError(f"{self.path.name}: {name} has {shape[0]} rows for {heads} heads. Copy it again.")
            order = to_halves(order[:, None], heads)[:, 0]
        # Gemma's norms multiply by one more than they hold; the files hold the sum.
        offset = 1.0 if self.architecture in _LAYERS_OF_27B and name.endswith("norm.weight") else 0.0

        def pieces() -> Iterator[torch.Tensor]:
            # A mapping of its own: pages that have been read count as memory of the process until theirs is gone.
            mapped = np.memmap(self.path, data.dtype, "r", place, data.shape)
            step = max(1, _PIECE // (4 * shape[-1])) if len(shape) == 2 else shape[0]
            for start in range(0, shape[0], step):
                values = self._dequantize(name, mapped[order[start : start + step]], kind)
                piece = torch.from_numpy(values - offset if offset else values).to(dtype)
                if not piece.isfinite().all():
                    raise CheckpointError(
                        f"{self.path.name}: {name} has numbers that {str(dtype).removeprefix('torch.')} does not hold. "
                        "Take the model's safetensors."
                    )
                yield piece

        return GgufTensor(name, shape, dtype, pieces)

    def _dequantize(self, name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        try:
            values: np.ndarray = gguf.dequantize(data, kind)
        except NotImplementedError:
            raise self.refused(f"the tensor {name} as", kind.name) from None
        return values

    def _own(self, name: str) -> Any:
        """What the file says about its own architecture."""
        self._read.add(name)
        return self.field(f"{self.architecture}.{name}")

    def _check_read(self, head_dim: int) -> None:
        """Whether all is known that the file says about its own architecture: it may change what the model computes."""
        own = f"{self.architecture}."
        said = {name.removeprefix(own) for name in self._fields if name.startswith(own)} - self._read - _HARMLESS
        neutral = {"attention.causal": True, "rope.dimension_count": head_dim, "rope.scaling.attn_factor": 1.0}
        if self.architecture == "phi3":
            said.discard("rope.scaling.attn_factor")  # transformers computes it
        values = {name: self._own(name) for name in sorted(said)}
        if unknown := [
            name for name, value in values.items() if (value != neutral[name] if name in neutral else value)
        ]:
            raise self.refused("the fields", ", ".join(unknown))

    def _number(self, name: str) -> Any:
        found = self._own(name)
        if not isinstance(found, int | float) or found <= 0:
            raise CheckpointError(
                f"{self.path.name} lacks {self.architecture}.{name}, or has {found!r}. Copy it again."
            )
        return found

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """`rope_parameters` of transformers."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self._own("rope.freq_base") or 10_000.0}
        if self.architecture == "phi3" and (rotated := self._own("rope.dimension_count") or head_dim) != head_dim:
            rope["partial_rotary_factor"] = rotated / head_dim
        if (scaling := self._own("rope.scaling.type")) == "linear":
            rope |= {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
        elif scaling not in (None, "none", "longrope"):
            raise self.refused("a context stretched by", scaling)
        whole, short, long = (self._factors(name) for name in _FACTORS)
        if short and long:  # Phi-3's
            length = self._number("rope.scaling.original_context_length")
            rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
            rope |= {"original_max_position_embeddings": length}
        elif whole:  # Llama 3.1's: each frequency divided by a factor of its own
            length = self._number("context_length")
            rope |= {"rope_type": "longrope", "short_factor": whole, "long_factor": whole, "attention_factor": 1.0}
            rope |= {"original_max_position_embeddings": length}
        return rope

    def _factors(self, name: str) -> list[float]:
        return [float(factor) for factor in self._tensors[name].data] if name in self._tensors else []

    def _experts(self) -> dict[str, Any]:
        return {
            "num_experts": self._number("expert_count"),
            "num_experts_per_tok": self._number("expert_used_count"),
            "moe_intermediate_size": self._number("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }

    def _gemma(self, config: dict[str, Any]) -> dict[str, Any]:
        layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
        is_27b = layers == _LAYERS_OF_27B[self.architecture]
        gemma = {
            "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
            "attn_logit_softcapping": self._own("attn_logit_softcapping"),
            "final_logit_softcapping": self._own("final_logit_softcapping"),
        }
        if self.architecture == "gemma2":
            for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"):
                self._number(name)  # every Gemma 2 has them
        pattern = self._own("attention.sliding_window_pattern")
        if pattern not in (None, {"gemma2": 2, "gemma3": 6}[self.architecture]):
            raise self.refused("the attention.sliding_window_pattern", pattern)
        if config["sliding_window"] is None:
            gemma |= {"layer_types": ["full_attention"] * layers, "sliding_window": config["max_position_embeddings"]}
        if self.architecture == "gemma3":
            local = {"rope_type": "default", "rope_theta": self._own("rope.freq_base_swa") or 10_000.0}
            gemma["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
        return gemma


def to_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the pairs that rotary embedding turns side by side; transformers keeps them half a head apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
