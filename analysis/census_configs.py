"""A tiny configuration of every causal language model of transformers, and what its forward must be given.

One rule covers most: every size that a configuration knows by a common name is made small (`SMALL`), also in the
configurations that it holds. `SPECIAL` adds, by model type, what the model's own code demands on top.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LENGTH", "VOCABULARY", "build", "inputs", "model_types"]

VOCABULARY = 211  # a width that no other dimension of these models has
LENGTH = 12
WIDTH, FEED, LAYERS, HEADS = 32, 48, 2, 4
LARGEST = 3_000_000  # parameters; a model beyond has a size that no name here reaches

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_size",
                     "hidden_size_global"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner",
         "ffn_hidden_size", "feed_forward_size"), FEED,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_layer", "encoder_layers", "decoder_layers",
         "num_decoder_layers", "hc_mult", "num_codebooks", "num_blocks"), LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads", "num_experts",
         "num_local_experts", "n_routed_experts", "moe_num_experts", "rotary_dim"), HEADS,
    ),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(
        ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "time_step_rank", "state_size", "d_state",
         "mamba_d_state", "ssm_state_size", "sliding_window", "n_mels", "attention_head_size", "swa_head_dim"), 8,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "logits_scaling": 3.0, "logit_scale": 0.3, "lm_head_multiplier": 0.5,
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "num_experts_per_tok": 2, "image_size": 32,
    "n_mlp_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FOUR = {"num_hidden_layers": 4}  # one period of a pattern of layers
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        "num_experts": 8, "num_expert_group": 1, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_patcher": {"vocab_size": VOCABULARY + 12},  # it has logits of its own, which are not the head's
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": FEED, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"per_layer_config": {}},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_audio_encoder": {"per_layer_config": {}, "adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8, "per_layer_config": {}},
    "gemma4_unified_vision": {
        "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH, "mm_posemb_size": 16, "patch_size": 4, "model_patch_size": 4,
        "pooling_kernel_size": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": FOUR,
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 12, "num_key_value_heads": 2},
    "moshi": {"audio_vocab_size": 50},
    "qwen3_5_moe_text": FOUR,
    "qwen3_5_text": FOUR,
    "qwen3_next": FOUR,
    "qwen4_exp_text": FOUR | {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 50, "hc_lowrank": 8, "ple_embed_dim": WIDTH,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [3, 4], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"],
        "num_buckets": 2, "hash_seed": 0, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xlstm": {"mode": "train", "return_last_states": True, "chunk_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5, "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

TRAINING = {"reformer"}  # differentiated in training mode alone; its dropout is 0


def model_types() -> list[str]:
    """The model types of the installed transformers that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _names(cls: type) -> set[str]:
    """The fields of a configuration class."""
    names: set[str] = set()
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if "__init__" in base.__dict__:
            names |= set(inspect.signature(base.__dict__["__init__"]).parameters)
    return names | set(getattr(cls, "attribute_map", {}))


def tiny(cls: Any, model_type: str) -> Any:
    """The small configuration of a class; what it holds is made small too."""
    names, renamed = _names(cls), getattr(cls, "attribute_map", {})
    values = {name: value for name, value in SMALL.items() if name in names and renamed.get(name, name) == name}
    try:
        default = cls()
    except Exception:  # some classes have no default
        default = None
    for name, declared in getattr(cls, "sub_configs", {}).items():
        present = getattr(default, name, None)
        held: Any = type(present) if present is not None else declared
        if name in names and isinstance(held, type) and held.__name__ != "AutoConfig":
            own = getattr(held, "model_type", "")
            if f"{model_type}_text" in SPECIAL and "text" in name:
                own = f"{model_type}_text"
            values[name] = tiny(held, own).to_dict()
    config = cls(**(values | SPECIAL.get(model_type, {})))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if not hasattr(config, name):
            setattr(config, name, SMALL[name])
    return config


def build(model_type: str) -> nn.Module:
    """The tiny random model of a type, fp32 and without dropout; its head spread wide, so that no softmax is flat.

    Raises whatever transformers does where it cannot build one, ValueError where it is not tiny.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    if "labels" not in inspect.signature(cls.forward).parameters:
        raise ValueError(f"{cls.__name__}.forward takes no labels, so it has no loss")
    config = tiny(CONFIG_MAPPING[model_type], model_type)
    if not isinstance(config, cls.config_class):  # the model of a part: the text's, the decoder's
        parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        config = next((part for part in parts if isinstance(part, cls.config_class)), None) or tiny(
            cls.config_class, cls.config_class.model_type
        )
    with contextlib.suppress(NotImplementedError), torch.device("meta"):  # some cannot be built without memory
        size = sum(p.numel() for p in cls(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f} M parameters are not tiny")
    torch.manual_seed(0)
    model = cls(config).train(model_type in TRAINING)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for x in [*(head.parameters() if isinstance(head, nn.Module) else ()), *_extra_biases(model)]:
            x.normal_(std=0.5)
    return model


def _extra_biases(model: nn.Module) -> list[Tensor]:
    return [x for name, x in model.named_buffers() if name.endswith("final_logits_bias")]


def inputs(model_type: str, model: Any) -> dict[str, Any]:
    """What the forward is given: ids away from the special ones, labels of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY - 11, (2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    given: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    if model_type == "git":  # its loss takes the image's tokens away, so there must be one
        given["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    if model_type in ("musicgen", "musicgen_melody"):  # one row and one label a codebook
        codebooks = model.config.num_codebooks
        given["input_ids"] = ids.repeat_interleave(codebooks, dim=0)
        given["labels"] = labels[..., None].repeat(1, 1, codebooks)
    return given
