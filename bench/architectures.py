"""Every architecture of transformers that can be built small in memory: language models, and image-text ones on text.

A config's own fields say what is a size; those are shrunk by their names, whatever the architecture. What such a rule
cannot guess stands in OVERRIDES, what text alone does not run in WHY_NOT.

All ids below VOCABULARY are text; special tokens that a config must name are 0, and those of pictures lie beyond.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

LAYERS = 4
VOCABULARY = 97
# Fields by their names: the first pattern that fits says the number.
SIZES: list[tuple[str, int]] = [
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_dense_layers|first_k_dense_replace", 1),
    (r"n_layers_per_attn_res_block", 1),
    (r"global_attn_every_n_layers|.*layer_interval|interleave_moe_layer_step|decoder_sparse_step", 2),
    (r"attn_layer_period|expert_layer_period|layer_group_size|_?sliding_window_pattern|.*_layer_period", 2),
    (r"attn_layer_offset|expert_layer_offset|.*_layer_offset", 1),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|layers|num_blocks|depth", LAYERS),
    (r"max_window_layers", 0),
    (r"(num|n)_(attention_)?heads?|(num_)?(en|de)coder_attention_heads|attention_heads", 6),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|num_query_groups", 2),
    (r"swa_num_attention_heads", 6),
    (r"swa_num_key_value_heads", 2),
    (r"qk_nope_head_dim|v_head_dim|swa_v_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim|qk_rope_dim", 4),
    (r"qk_head_dim", 12),
    (r"global_head_dim", 16),
    (r"(swa_|attention_)?head_dim|kv_channels|attention_head_size|dim_head|attention_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*_rank|rank_.*", 16),
    (r"hidden_size_per_layer_input|altup_.*size", 8),
    (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|word_embed_proj_dim|embedding_dim|lru_width"
     r"|input_embedding_size|output_embedding_size|attention_hidden_size|projection_dim|out_hidden_size", 48),
    (r"moe_intermediate_size|.*expert.*intermediate_size|expert_ffn_hidden_size|.*intermediate_size.*|ffn_dim|dff|d_inner"
     r"|(en|de)coder_ffn_dim|dim_ff|ffn_hidden_size|n_inner|feed_forward_size|.*mlp_dim", 80),
    (r"vocab_size_per_layer_input|vocab_size|unpadded_vocab_size|decoder_vocab_size", VOCABULARY),
    (r"type_vocab_size", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    (r"max_target_positions", 256),
    (r"original_max_position_embeddings", 128),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts|text_moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|.*top_?k_?experts", 2),
    (r"n_group|topk_group|num_expert_group|o_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention", 7),
    (r"attention_chunk_size", 8),
    (r"index_topk(_blocks)?", 4),
    (r"index_n_heads|linear_num_(key|value)_heads", 2),
    (r"linear_num_heads", 6),
    (r"index_head_dim|linear_(key|value)_head_dim|linear_head_dim", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_(num|n)_heads|n_mamba_heads|mamba_n_heads", 6),
    (r"mamba_d_head|mamba_head_?dim", 16),
    (r"mamba_(n_groups|ngroups)|n_groups", 1),
    (r"mamba_d_ssm", 96),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"image_size|crop_size|input_size", 28),
    (r"patch_size", 14),
    (r"num_codebooks", 1),  # ids of several are shaped otherwise
    (r"zero_expert_num|num_layers_per_stack", 2),
    (r"base_channels|latent_channels|(output|out)_channels|.*out_channel|.*conv_channels|num_pos_feats", 32),
    (r"(projector|vision|global|encoder|text|moe|output|downsample|image)_hidden_size|hidden_size_global", 48),
    (r"output_dim|projection_hidden_dim|.*_embed_dim", 48),
    (r".*expert_dim", 80),
    (r"num_position_embeddings", 16),
    (r"num_embeddings|.*_vocab_size|.*_vocab(_size_base)?|position_embedding_size", VOCABULARY),
    (r"kv_n_heads", 2),
]  # fmt: skip
SPECIAL = re.compile(r"(decoder_start|pad|bos|eos|eod|sep|cls|mask|forced_[be]os)_token_id|pad_index|(un?k|mask)_index")
SEEN = re.compile(r"(.*_)?(image|video|audio|vision)_(.*_)?token_(id|index)")
UNTOUCHED = frozenset({
    "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id", "num_labels",
    "rope_parameters", "rope_scaling", "per_layer_config",
})  # fmt: skip
# What None may stand for; elsewhere it says that a part is not there.
UNSAID = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}

_SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4}
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_TWO_KINDS = ["sliding_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SEES = {"text_config": {"rope_parameters": _MROPE}}
_MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_expand": 2}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
         "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 1.0}  # fmt: skip
_DOTS3 = {"per_layer_config": {i: {"head_dim": 20, "qk_nope_head_dim": 16, "kv_lora_rank": 24} for i in (1, 3)}}
_INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
            "indexer_compress_ratio": 2}  # fmt: skip
_COMPASS = {"layer_types": _TWO_KINDS, "rope_parameters": {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
}}  # fmt: skip
_SAM = {"vision_config": {"sam_config": {"downsample_channels": [32, 48]}}}
# In the place of towers of timm, which may not be installed: text does not pass them.
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
           "num_attention_heads": 6, "image_size": 28, "patch_size": 14}  # fmt: skip
# What the rule does not guess.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "blt": {"patch_size": 4, "num_hidden_layers": 4},
    "chameleon": {"vocabulary_map": {"<image>": 97}, "vq_config": {"channel_multiplier": [1, 2], "resolution": 16}},
    "codegen": {"n_head": 8, "n_embd": 64, "rotary_dim": 4},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}, **_SAM},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}}},
    "fast_vlm": {"vision_config": _SIGLIP},
    "florence2": {
        "vision_config": {"embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4}
    },
    "glm46v": _SEES,
    "glm4v": _SEES,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0, "qk_head_dim": 8, "index_kpool": 2}},
    "glm_ocr": _SEES,
    "glmga": _SEES,
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 1]],
        "spatial_target_layers": [2],
        "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **_MAMBA},
    "hrm_text": {"num_hidden_layers": 16},  # two stacks of two layers, run two times four times over
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}}},
    "janus": {"vq_config": {"channel_multiplier": [1, 2]}},
    "laguna": {"layer_types": _TWO_KINDS, "num_attention_heads_per_layer": [6, 4] * 2},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "lfm2_vl": {"text_config": _CONV},
    "mamba2": {"num_heads": 6, "head_dim": 16},
    "mellum": {"layer_types": _TWO_KINDS},
    "mimo_v2_flash": {"num_key_value_heads": 1, "v_head_dim": 4},
    "minimax_m3_vl": {"text_config": _SPARSE},
    "minimax_m3_vl_text": _SPARSE,
    "mistral4": {"rope_parameters": _YARN},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "muse_spark": {"audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4}},
    "paddleocr_vl": _SEES,
    "perception_lm": {"vision_config": {**_SIGLIP, "model_args": {"embed_dim": 48}}},
    "qwen2_5_omni_thinker": _SEES,
    "qwen2_5_vl": _SEES,
    "qwen2_vl": _SEES,
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 32]},
    "step3p7": {"text_config": {"layer_types": _TWO_KINDS, "sliding_window": 7, "num_sliding_attention_heads": 4}},
    "unlimited_ocr": _SAM,
    "xlnet": {"d_head": 8},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},  # queries are rounded up to 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 96, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 96, "attention_head_dim": 16, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}

_PIXELS = "its forward needs pictures, also beside text"
_SEQ2SEQ = "an encoder-decoder, "
# What text alone does not run, and why. Some of these can be built all the same.
WHY_NOT: dict[str, str] = {
    "blip": _PIXELS,
    "blip-2": _PIXELS,
    "diffusion_gemma": "fills a canvas of tokens drawn at random at every forward: it has no logits of the prompt",
    "florence2": _SEQ2SEQ + "whose logits are those of a decoder that begins with one token, not of the ids",
    "gemma3n": "its vision tower is always one of timm, which is not installed; gemma3n_text is the same without",
    "gemma4_assistant": "drafts for another model: its forward needs that model's hidden states and keys",
    "gemma4_unified_assistant": "drafts for another model: its forward needs that model's hidden states and keys",
    "idefics": _PIXELS,
    "instructblip": _PIXELS,
    "instructblipvideo": _PIXELS,
    "kosmos-2": _PIXELS,
    "pi0": "moves robots: its forward needs the state of one",
    "pix2struct": _SEQ2SEQ + "whose encoder reads patches of pictures only",
    "pp_formulanet": _SEQ2SEQ + "whose encoder reads pictures only",
    "t5gemma2": _SEQ2SEQ + "whose decoder needs ids of its own",
    "udop": _SEQ2SEQ + "that needs the places of words on a page",
    "vision-encoder-decoder": _SEQ2SEQ + "whose encoder reads pictures only",
}


def names() -> list[str]:
    """The model types of both mappings."""
    return sorted(_classes())


def build(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random model in eval mode, the same at every call. Raises ValueError for a model type that is none."""
    from models.tiny import _randomize

    if model_type not in _classes():
        raise ValueError(f"no architecture {model_type!r}: expected one of {names()}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _classes()[model_type](_config(model_type)).eval()
        _randomize(model)
        _tame(model)
    model = model.to(dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model


def _classes() -> dict[str, Any]:
    import transformers
    from transformers.models.auto import modeling_auto

    found = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found |= modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    first = {kind: name if isinstance(name, str) else name[0] for kind, name in found.items()}
    return {kind: getattr(transformers, name) for kind, name in first.items() if hasattr(transformers, name)}


def _config(model_type: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_class = _classes()[model_type].config_class
    fields = _shrunk(config_class().to_dict())
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and fields.get("is_decoder") is False:
        fields["is_decoder"] = True  # or BERT and its like see what comes later
    return config_class(**_merged(fields, OVERRIDES.get(model_type, {})))


def _merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The second over the first, in nested configs, too."""
    both = dict(fields)
    for name, value in more.items():
        nested = isinstance(value, dict) and isinstance(both.get(name), dict) and name.endswith("config")
        both[name] = _merged(both[name], value) if nested else value
    return both


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in UNTOUCHED:
            continue
        if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            small[name] = _shrunk(value)
        elif SPECIAL.fullmatch(name):
            if isinstance(value, int):
                small[name] = 0
        elif SEEN.fullmatch(name) and isinstance(value, int):
            small[name] = value + VOCABULARY  # outside: the vocabulary's own are all text
        elif isinstance(value, list) and value and all(type(one) is int for one in value) and (number := _size(name)):
            small[name] = [number] * min(len(value), LAYERS)
        elif isinstance(value, list) and len(value) > LAYERS and re.search("layer|types|block|pattern|size", name):
            small[name] = _some_of_each(value)
        elif type(value) is int and (number := _size(name)) is not None:
            small[name] = number
        elif value is None and name in UNSAID:
            small[name] = UNSAID[name]
        else:
            small[name] = value
    if "qk_nope_head_dim" in small:  # latent attention: as many keys as queries, of two parts
        small |= {"head_dim": 4, "num_key_value_heads": 6, "qk_head_dim": 12}
    if sections := _mrope(fields):
        rope: dict[str, Any] = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        half = int(small.get("head_dim") or 48 // 6) * rope.get("partial_rotary_factor", 1) / 2
        small["rope_parameters"] = rope | {"mrope_section": [2, 1, 1] if half >= 4 else [1, 1, 0][: len(sections)]}
        small["rope_parameters"].setdefault("rope_theta", 10000.0)
    return small


def _mrope(fields: dict[str, Any]) -> Any:
    """How places in three dimensions share out rotary frequencies, if they do."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return rope.get("mrope_section")


def _size(name: str) -> int | None:
    return next((number for pattern, number in SIZES if re.fullmatch(pattern, name)), None)


def _some_of_each(kinds: list[Any]) -> list[Any]:
    """LAYERS of them, in which every kind occurs that occurs at all, if it fits."""
    different = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return [different[i % len(different)] for i in range(LAYERS)] if len(different) <= LAYERS else kinds[:LAYERS]


@torch.no_grad()
def _tame(model: nn.Module) -> None:
    """State-space parameters that random numbers would let explode: decays stay between 0 and 1."""
    for name, parameter in model.named_parameters():
        if re.search(r"A_log|dt_bias|dt_proj\.bias|time_decay|a_param|recurrent_param", name):
            parameter.uniform_(-4, -2)
