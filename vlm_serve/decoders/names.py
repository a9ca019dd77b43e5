"""The tensors of text checkpoints by the decoder's own names, and those that they keep merged taken apart."""

import re
from collections.abc import Iterator, Mapping

import torch

from vlm_serve.decoders.config import DecoderConfig

PREFIXES = {
    "model.decoder.final_layer_norm.": "decoder.norm.",
    "model.decoder.": "decoder.",
    "decoder.final_layer_norm.": "decoder.norm.",
    "decoder.": "decoder.",
    "transformer.": "decoder.",
    "model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
}

GEMMA2 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_norm",
}

PARTS: Mapping[str, Mapping[str, str]] = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "opt": {
        "self_attn_layer_norm": "input_layernorm",
        "final_layer_norm": "post_attention_layernorm",
        "out_proj": "o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    "falcon": {
        "word_embeddings": "embed_tokens",
        "h": "layers",
        "ln_f": "norm",
        "ln_attn": "input_layernorm",
        "ln_mlp": "post_attention_layernorm",
        "self_attention": "self_attn",
        "query_key_value": "qkv_proj",
        "dense": "o_proj",
        "dense_h_to_4h": "fc1",
        "dense_4h_to_h": "fc2",
    },
    "mixtral": {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}
"""By `model_type`, the parts of a name that the decoder has another name for; most have Llama's, which are its own."""

_MERGED = re.compile(
    r"(?P<parent>.*?)\.(?P<module>qkv_proj|gate_up_proj|experts\.gate_up_proj|experts\.down_proj)(?P<end>|\.weight|\.bias)"
)


def text_name(model_type: str, name: str) -> str:
    """The decoder's name of a tensor that a text checkpoint of this type calls `name`, such as
    `decoder.layers.0.mlp.up_proj.weight` of `model.layers.0.mlp.up_proj.weight`.

    One that holds several of the decoder's comes out as `….self_attn.qkv_proj.weight`, `….mlp.gate_up_proj.weight`,
    `….mlp.experts.gate_up_proj` or `….mlp.experts.down_proj`: see `split_merged`.
    """
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
            break
    parts = PARTS.get(model_type, {})
    return ".".join(parts.get(part, part) for part in name.split("."))


def split_merged(config: DecoderConfig, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the decoder in one of a checkpoint, each with its name: itself, unless it is a merged one.

    Args:
        name: from `text_name`.
        tensor: `[rows, …]`, a merged one's parts one after the other in its rows; with an adapter's B it works as well.
    """
    match = _MERGED.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    parent, end = match["parent"], match["end"]
    if match["module"] == "qkv_proj":
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
        if tensor.shape[0] != sum(heads.values()) * config.head_dim:
            yield f"{parent}.q_proj{end}", tensor  # whose shape is told
            return
        rows = _grouped(config, tensor) if config.architecture == "falcon" else tensor
        parts = rows.split([count * config.head_dim for count in heads.values()])
        yield from zip((f"{parent}.{part}{end}" for part in heads), parts, strict=True)
    elif match["module"] == "gate_up_proj":
        middle = tensor.shape[0] // 2
        yield f"{parent}.gate_proj{end}", tensor[:middle]
        yield f"{parent}.up_proj{end}", tensor[middle:]
    else:
        for expert, matrix in enumerate(tensor):
            whole = f"{parent}.experts.{expert}.{match['module'].removeprefix('experts.')}.weight"
            yield from split_merged(config, whole, matrix)


def _grouped(config: DecoderConfig, tensor: torch.Tensor) -> torch.Tensor:
    """Falcon's rows in Phi-3's order: its queries lie with the key and the value of their group, group by group."""
    per_group = config.num_heads // config.num_kv_heads
    groups = tensor.unflatten(0, (config.num_kv_heads, per_group + 2, config.head_dim))
    query, key, value = groups.split([per_group, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in (query, key, value)])
