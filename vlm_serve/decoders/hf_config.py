"""The fields of a `DecoderConfig` from a text config of transformers, architecture by architecture.

What an architecture can do and the decoder has no part for is refused here, by the name of its field.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_serve.decoders.kinds import AttentionKind, MlpKind, NormKind, PositionKind
from vlm_serve.errors import CheckpointError
from vlm_serve.layers.rotary import RopeScaling

Config = Mapping[str, Any]
Fields = dict[str, Any]

ALL_SLIDE = ("mistral", "mixtral", "phi3", "qwen3_moe")
"""Architectures whose `sliding_window` is of every layer; others name those that slide in `layer_types`."""

NONE_SLIDES = ("llama", "gemma", "opt", "falcon", "qwen3_vl_text")
"""A `sliding_window` in such a config is not used."""

SCALINGS = ("linear", "llama3", "yarn", "longrope")


def read_fields(config: Config) -> Fields:
    """What `DecoderConfig` is made with.

    Raises:
        CheckpointError: the architecture, or something in it, is not known here.
    """
    architecture = config.get("model_type")
    read = READERS.get(architecture) if isinstance(architecture, str) else None
    if read is None:
        raise CheckpointError(f"Decoders of type {architecture!r} are not known. Known: {', '.join(map(repr, KNOWN))}.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    fields: Fields = {
        "architecture": architecture,
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "max_positions": config["max_position_embeddings"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_attention_kinds(str(architecture), config),
    }
    return fields | _rope(config) | read(config)


def _llama(config: Config) -> Fields:
    """RMSNorm and a gated MLP, which most have."""
    bias = bool(config.get("attention_bias", False))
    return {
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "activation": config.get("hidden_act") or "silu",
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _qwen2(config: Config) -> Fields:
    return _llama(config) | {"attention_bias": True}


def _qwen3(config: Config) -> Fields:
    return _llama(config) | {"qk_norm": True}


def _qwen2_vl(config: Config) -> Fields:
    return _qwen2(config) | _mrope(config, (16, 24, 24), interleaved=False)


def _qwen3_vl(config: Config) -> Fields:
    return _qwen3(config) | _mrope(config, (24, 20, 20), interleaved=True)


def _smollm3(config: Config) -> Fields:
    rotates = config["no_rope_layers"]
    return _llama(config) | {"unrotated_layers": tuple(index for index, does in enumerate(rotates) if not does)}


def _phi3(config: Config) -> Fields:
    rope = config.get("rope_parameters") or {}
    return _llama(config) | {"partial_rotary_factor": float(rope.get("partial_rotary_factor") or 1.0)}


def _mixtral(config: Config) -> Fields:
    return _llama(config) | {
        "mlp": MlpKind.EXPERTS,
        "num_experts": config.get("num_local_experts") or config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "experts_intermediate_size": config["intermediate_size"],
    }


def _qwen3_moe(config: Config) -> Fields:
    every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return _qwen3(config) | {
        "mlp": MlpKind.EXPERTS,
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "experts_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "dense_layers": tuple(index for index in layers if index in dense or (index + 1) % every),
    }


def _gemma(config: Config) -> Fields:
    _refuse(config, use_bidirectional_attention=bool(config.get("use_bidirectional_attention")))
    activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    return _llama(config) | {
        "norm": NormKind.RMS_PLUS_ONE,
        "embedding_scale": config["hidden_size"] ** 0.5,
        # The first releases of the first Gemma say "gelu" where the approximation by tanh is meant.
        "activation": "gelu_pytorch_tanh" if (config["model_type"], activation) == ("gemma", "gelu") else activation,
    }


def _gemma2(config: Config) -> Fields:
    return _gemma(config) | {
        "post_norms": True,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping"),
        "logit_softcap": config.get("final_logit_softcapping"),
    }


def _gemma3(config: Config) -> Fields:
    """transformers reads no cap of its attention's scores."""
    return _gemma2(config) | {"qk_norm": True, "attention_softcap": None}


def _opt(config: Config) -> Fields:
    _refuse(
        config,
        do_layer_norm_before=not config["do_layer_norm_before"],
        word_embed_proj_dim=config["word_embed_proj_dim"] != config["hidden_size"],
        layer_norm_elementwise_affine=not config["layer_norm_elementwise_affine"],
        _remove_final_layer_norm=bool(config.get("_remove_final_layer_norm")),
    )
    bias = bool(config["enable_bias"])
    return {
        "intermediate_size": config["ffn_dim"],
        "norm": NormKind.LAYER,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "position": PositionKind.LEARNED,
        "position_offset": 2,
        "mlp": MlpKind.PLAIN,
        "activation": config["activation_function"],
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


def _falcon(config: Config) -> Fields:
    is_new = bool(config["new_decoder_architecture"])
    is_parallel = bool(config["parallel_attn"])
    norms = config.get("num_ln_in_parallel_attn") or (2 if is_new else 1)
    # Combinations that no checkpoint has, and that transformers' own model stumbles over.
    _refuse(config, parallel_attn=is_new and not is_parallel, num_ln_in_parallel_attn=norms == 2 and not is_new)
    heads, bias = config["num_attention_heads"], bool(config["bias"])
    kv_heads = config["num_kv_heads"] if is_new else 1 if config["multi_query"] else heads
    return {
        "num_kv_heads": kv_heads,
        "intermediate_size": config["ffn_hidden_size"],
        "norm": NormKind.LAYER,
        "norm_bias": True,
        "norm_eps": config["layer_norm_epsilon"],
        "position": PositionKind.ALIBI if config["alibi"] else PositionKind.ROPE,
        "parallel_residual": is_parallel,
        "mlp_norm": not is_parallel or norms == 2,
        "mlp": MlpKind.PLAIN,
        "activation": config["activation"],
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


READERS: dict[str, Callable[[Config], Fields]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "opt": _opt,
    "falcon": _falcon,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_vl_text": _qwen2_vl,
    "qwen2_5_vl_text": _qwen2_vl,
    "qwen3_vl_text": _qwen3_vl,
}

KNOWN = tuple(READERS)
"""`model_type` of the text configs that can be read."""


def _refuse(config: Config, **unserved: bool) -> None:
    if found := [f"{name}={config.get(name)!r}" for name, is_so in unserved.items() if is_so]:
        raise CheckpointError(f"Decoders of type {config['model_type']!r} with {', '.join(found)} are not served.")


def _attention_kinds(architecture: str, config: Config) -> Fields:
    """The window and the kind of each layer, as transformers' model of that architecture reads them."""
    window, count = config.get("sliding_window"), config["num_hidden_layers"]
    if architecture in NONE_SLIDES or window is None or config.get("use_sliding_window") is False:
        return {}
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(f"sliding_window is {window!r}; it must be a count of positions.")
    if architecture in ALL_SLIDE:
        return {"sliding_window": window, "layer_types": (AttentionKind.SLIDING,) * count}
    names = config.get("layer_types") or ()
    if len(names) != count or not set(names) <= set(AttentionKind):
        raise CheckpointError(
            f"layer_types must name {', '.join(AttentionKind)} for each of {count} layers; it is {list(names)}."
        )
    kinds = tuple(AttentionKind(name) for name in names)
    return {"sliding_window": window, "layer_types": kinds} if AttentionKind.SLIDING in kinds else {}


def _rope(config: Config) -> Fields:
    """Thetas, scaling and the context that follows, from transformers 5's `rope_parameters` or the older fields."""
    rope: Config = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
    }
    if AttentionKind.FULL not in rope:
        return _scaled(config, rope)
    local: Config = rope.get(AttentionKind.SLIDING) or {}
    if _kind(local) != "default":
        raise CheckpointError(f"RoPE scaling {_kind(local)!r} of layers that slide is not served.")
    fields = _scaled(config, rope[AttentionKind.FULL])
    return fields | {"local_rope_theta": float(local["rope_theta"])} if local else fields


def _kind(rope: Config) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "default" if kind == "mrope" else str(kind)


def _scaled(config: Config, rope: Config) -> Fields:
    fields: Fields = {"rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)}
    kind, limit = _kind(rope), config["max_position_embeddings"]
    # "dynamic" changes nothing up to `max_position_embeddings`, which is where the context ends here. Past it each
    # length has frequencies of its own, by which every key before would have to be rotated again at every token.
    if kind in ("default", "dynamic"):
        return fields
    if kind not in SCALINGS:
        known = ", ".join(map(repr, ("default", "dynamic", *SCALINGS)))
        raise CheckpointError(f"RoPE scaling {kind!r} is not known. Known: {known}.")
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or limit
    factor = rope.get("factor") or limit / original
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    settings: Fields = {name: rope[name] for name in (*names, "attention_factor") if rope.get(name) is not None}
    if kind == "longrope":
        settings |= {name: tuple(rope[name]) for name in ("short_factor", "long_factor")}
    scaling = RopeScaling(kind, factor=factor, original_max_position_embeddings=original, **settings)
    if kind == "yarn":
        fields["max_positions"] = max(limit, int(factor * original))
    return fields | {"rope_scaling": scaling}


def _mrope(config: Config, section: tuple[int, ...], *, interleaved: bool) -> Fields:
    section = tuple((config.get("rope_parameters") or {}).get("mrope_section") or section)
    half = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    if len(section) != 3 or sum(section) != half:
        raise CheckpointError(f"mrope_section is {list(section)}; it must divide {half} frequencies among three axes.")
    return {"position": PositionKind.MROPE, "mrope_section": section, "mrope_interleaved": interleaved}
