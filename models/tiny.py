"""Tiny random models of every family, and processors for those that see images: built in memory, without a hub."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

CHARACTERS = ("<unk>", "\n", *map(chr, range(32, 127)))

Fields = dict[str, Any]
# A family's model class and the fields of its config.
Table = dict[str, tuple[str, Fields]]

# Heads / key-value heads / width / vocabulary are odd on purpose: mixing two of them up must not go unnoticed.
# Windows are shorter than any prompt worth testing, soft caps low enough to bite.
_SIZES: Fields = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
_TEXT: Fields = dict(_SIZES, vocab_size=97, max_position_embeddings=128)
_GROUPED: Fields = dict(_TEXT, num_key_value_heads=2)
_GPT2: Fields = dict(n_layer=3, n_embd=40, n_head=5, n_positions=128, vocab_size=97)
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=32)  # fmt: skip
_GEMMA2: Fields = dict(_GROUPED, head_dim=16, query_pre_attn_scalar=24, sliding_window=7, layer_types=_ALTERNATING)
_GEMMA3: Fields = dict(_GEMMA2, rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=100.0),
                       full_attention=dict(rope_type="linear", rope_theta=10000.0, factor=8.0)))  # fmt: skip
_FALCON: Fields = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, vocab_size=97,
                       max_position_embeddings=128)  # fmt: skip

TEXT: Table = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gptj": ("GPTJForCausalLM", dict(_GPT2, rotary_dim=4)),
    "gpt_neox": ("GPTNeoXForCausalLM", dict(_TEXT, rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                                       partial_rotary_factor=0.5))),
    "opt": ("OPTForCausalLM", dict(hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=6,
                                   vocab_size=97, max_position_embeddings=128, word_embed_proj_dim=48)),
    "llama": ("LlamaForCausalLM", dict(_GROUPED, head_dim=8, rope_parameters=_LLAMA3)),
    "mistral": ("MistralForCausalLM", dict(_GROUPED, head_dim=8, sliding_window=7)),
    "mixtral": ("MixtralForCausalLM", dict(_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("Qwen2ForCausalLM", dict(_GROUPED, tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", dict(_GROUPED, head_dim=16)),
    "gemma2": ("Gemma2ForCausalLM", dict(_GEMMA2, attn_logit_softcapping=5.0, final_logit_softcapping=10.0)),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA3),
    "phi3": ("Phi3ForCausalLM", dict(_GROUPED, sliding_window=7, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "falcon": ("FalconForCausalLM", _FALCON),
    "falcon_alibi": ("FalconForCausalLM", dict(_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "bloom": ("BloomForCausalLM", dict(hidden_size=48, n_layer=3, n_head=6, vocab_size=97)),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
}  # fmt: skip

# What the vision towers share; the images of every family are resized to 28 x 28 pixels and give four tokens or so.
_VISION: Fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
_CLIP: Fields = dict(_VISION, model_type="clip_vision_model", image_size=28, patch_size=14, projection_dim=32)
_SIGLIP: Fields = dict(_VISION, model_type="siglip_vision_model", image_size=28, patch_size=14, vision_use_head=False)
_IDEFICS_VISION: Fields = dict(_VISION, image_size=28, patch_size=7)
_QWEN_VISION: Fields = dict(depth=2, num_heads=4, patch_size=7, spatial_merge_size=2, temporal_patch_size=2)
_SEES: Fields = dict(_GROUPED, vocab_size=112, max_position_embeddings=512)
_QWEN2_VL: Fields = dict(_SEES, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]))
_QWEN3_VL: Fields = dict(_SEES, head_dim=16, rope_parameters=dict(
    rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True))  # fmt: skip

IMAGE_TEXT: Table = {
    "llava": ("LlavaForConditionalGeneration", dict(
        image_token_index=97, vision_config=_CLIP, text_config=dict(_SEES, model_type="llama"), image_seq_length=4)),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", dict(
        image_token_index=97, video_token_index=98, vision_config=_SIGLIP,
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]],
        text_config=dict(_SEES, model_type="qwen2", tie_word_embeddings=True))),
    "idefics2": ("Idefics2ForConditionalGeneration", dict(
        image_token_id=97, vision_config=_IDEFICS_VISION,
        perceiver_config=dict(hidden_size=48, rms_norm_eps=1e-6, resampler_n_latents=4, resampler_depth=2,
                              resampler_n_heads=4, resampler_head_dim=8, num_key_value_heads=2),
        text_config=dict(_SEES, model_type="mistral", head_dim=8, sliding_window=11))),
    "idefics3": ("Idefics3ForConditionalGeneration", dict(
        image_token_id=97, scale_factor=2, vision_config=_IDEFICS_VISION,
        text_config=dict(_SEES, model_type="llama"))),
    "smolvlm": ("SmolVLMForConditionalGeneration", dict(
        image_token_id=97, scale_factor=2, vision_config=_IDEFICS_VISION, tie_word_embeddings=True,
        text_config=dict(_SEES, model_type="llama", tie_word_embeddings=True))),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", dict(
        image_token_id=97, video_token_id=98, vision_start_token_id=99, vision_end_token_id=100,
        vision_config=dict(_QWEN_VISION, embed_dim=32, hidden_size=48), text_config=_QWEN2_VL)),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", dict(
        image_token_id=97, video_token_id=98, vision_start_token_id=99, vision_end_token_id=100,
        vision_config=dict(_QWEN_VISION, hidden_size=32, out_hidden_size=48, intermediate_size=64, window_size=14,
                           fullatt_block_indexes=[1]),
        text_config=_QWEN2_VL)),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", dict(
        image_token_id=97, video_token_id=98, vision_start_token_id=99, vision_end_token_id=100,
        vision_config=dict(_QWEN_VISION, hidden_size=32, out_hidden_size=48, intermediate_size=64,
                           num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        text_config=_QWEN3_VL)),
    "paligemma": ("PaliGemmaForConditionalGeneration", dict(
        image_token_index=97, vision_config=_SIGLIP, projection_dim=48, hidden_size=48, vocab_size=112,
        text_config=dict(_SEES, model_type="gemma", head_dim=16, num_key_value_heads=1))),
    "gemma3_vl": ("Gemma3ForConditionalGeneration", dict(
        image_token_index=97, boi_token_index=98, eoi_token_index=99, mm_tokens_per_image=4,
        vision_config=dict(_SIGLIP, patch_size=7), text_config=dict(_GEMMA3, vocab_size=112,
                                                                    max_position_embeddings=512))),
    "internvl": ("InternVLForConditionalGeneration", dict(
        image_token_id=97, image_seq_length=4, downsample_ratio=0.5,
        vision_config=dict(_VISION, image_size=28, patch_size=7),
        text_config=dict(_SEES, model_type="qwen2"), tie_word_embeddings=False)),
    # The image token is beyond the vocabulary, as in the released models: it has an embedding, but no logit.
    "mllama": ("MllamaForConditionalGeneration", dict(
        image_token_index=98,
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1,
                           attention_heads=4, image_size=28, patch_size=14, intermediate_layers_indices=[0, 1],
                           vision_output_dim=96),
        text_config=dict(_SEES, vocab_size=98, bos_token_id=97, num_hidden_layers=4, cross_attention_layers=[1, 3]))),
}  # fmt: skip

# The text tower of CLIP is causal, and its answer is read at the end token, "~"; other encoders see all tokens.
_CLIP_TEXT: Fields = dict(_TEXT, projection_dim=32, eos_token_id=96)
ENCODERS: Table = {
    "bert": ("BertForMaskedLM", dict(_TEXT, type_vocab_size=2)),
    # Its positions count from the padding token's id on.
    "roberta": ("RobertaForMaskedLM", dict(_TEXT, type_vocab_size=1, pad_token_id=0, max_position_embeddings=129)),
    "vit": ("ViTForImageClassification", dict(_SIZES, image_size=28, patch_size=7, num_labels=5)),
    "clip": ("CLIPModel", dict(text_config=_CLIP_TEXT, vision_config=_CLIP, projection_dim=32)),
    "clip_text": ("CLIPTextModelWithProjection", _CLIP_TEXT),
    "clip_vision": ("CLIPVisionModelWithProjection", _CLIP),
}

_SQUARE = dict(height=28, width=28)
_IDEFICS_TOKENS = dict(image_token="<image>", fake_image_token="<fake_token_around_image>",
                       end_of_utterance_token="<end_of_utterance>", global_image_token="<global-img>")  # fmt: skip
_QWEN_TOKENS = dict(image_token="<|image_pad|>", video_token="<|video_pad|>",
                    vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")  # fmt: skip
_QWEN_IMAGES: Fields = dict(patch_size=7, merge_size=2, temporal_patch_size=2,
                            size=dict(shortest_edge=28 * 28, longest_edge=28 * 56))  # fmt: skip
_QWEN_MARKER = "<|vision_start|><|image_pad|><|vision_end|>"


class _Seeing(NamedTuple):
    """How a family sees: its processors' classes and fields, the tokens after the 97 characters, and the marker."""

    processor: str
    fields: Fields
    image_processor: str
    image_fields: Fields
    tokens: dict[str, str]
    marker: str = "<image>"


# The image processors are those on PIL and numpy: the others need torchvision.
_PROCESSORS: dict[str, _Seeing] = {
    "llava": _Seeing(
        "LlavaProcessor",
        dict(patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default"),
        "LlavaImageProcessorPil", dict(size=dict(shortest_edge=28), crop_size=_SQUARE), dict(image_token="<image>")),
    "llava_onevision": _Seeing(
        "LlavaOnevisionProcessor", dict(num_image_tokens=4, vision_feature_select_strategy="full"),
        "LlavaOnevisionImageProcessorPil",
        dict(size=_SQUARE, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]]),
        dict(image_token="<image>", video_token="<video>")),
    "idefics2": _Seeing(
        "Idefics2Processor", dict(image_seq_len=4),
        "Idefics2ImageProcessorPil", dict(size=dict(shortest_edge=14, longest_edge=28)),
        dict(image_token="<image>", image_boundary_token="<fake_token_around_image>",
             end_of_utterance_token="<end_of_utterance>")),
    "idefics3": _Seeing(
        "Idefics3Processor", dict(image_seq_len=4), "Idefics3ImageProcessorPil",
        dict(size=dict(longest_edge=56), max_image_size=dict(longest_edge=28)),
        dict(_IDEFICS_TOKENS, **{f"tile_{i}_{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)})),
    "smolvlm": _Seeing(
        "SmolVLMProcessor", dict(image_seq_len=4), "SmolVLMImageProcessorPil",
        dict(size=dict(longest_edge=28), max_image_size=dict(longest_edge=28)), _IDEFICS_TOKENS),
    "qwen2_vl": _Seeing(
        "Qwen2VLProcessor", {}, "Qwen2VLImageProcessorPil", _QWEN_IMAGES, _QWEN_TOKENS, _QWEN_MARKER),
    "qwen2_5_vl": _Seeing(
        "Qwen2_5_VLProcessor", {}, "Qwen2VLImageProcessorPil", _QWEN_IMAGES, _QWEN_TOKENS, _QWEN_MARKER),
    "qwen3_vl": _Seeing(
        "Qwen3VLProcessor", {}, "Qwen2VLImageProcessorPil", _QWEN_IMAGES, _QWEN_TOKENS, _QWEN_MARKER),
    "paligemma": _Seeing(
        "PaliGemmaProcessor", {}, "SiglipImageProcessorPil", dict(size=_SQUARE, image_seq_length=4),
        dict(image_token="<image>", bos_token="<bos>")),
    "gemma3_vl": _Seeing(
        "Gemma3Processor", dict(image_seq_length=4), "Gemma3ImageProcessorPil", dict(size=_SQUARE),
        dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"),
        "<start_of_image>"),
    "internvl": _Seeing(
        "InternVLProcessor", dict(image_seq_length=4), "GotOcr2ImageProcessorPil", dict(size=_SQUARE, max_patches=2),
        dict(context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>",
             video_token="<video>"),
        "<IMG_CONTEXT>"),
    "mllama": _Seeing(
        "MllamaProcessor", {}, "MllamaImageProcessorPil", dict(size=_SQUARE, max_image_tiles=4),
        dict(bos_token="<|begin_of_text|>", image_token="<|image|>"), "<|image|>"),
}  # fmt: skip


def tiny(family: str) -> Any:
    """A tiny random model of a family, in float32 and eval mode, the same at every call.

    Every parameter is random, also the biases, norms and gates that a fresh model has at zero or one.
    """
    import transformers

    table = TEXT | IMAGE_TEXT | ENCODERS
    if family not in table:
        raise ValueError(f"no tiny model of family {family!r}: expected one of {sorted(table)}")
    class_name, fields = deepcopy(table[family])  # configs write into what they are given
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**_without_special_tokens(fields))).eval()
        _randomize(model)
    return model


def _without_special_tokens(fields: Fields) -> Fields:
    """The fields, also the nested ones, without begin, end and padding: the defaults may lie outside the vocabulary."""
    nested = {key: _without_special_tokens(value) for key, value in fields.items() if key.endswith("_config")}
    none = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return none | fields | nested


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.numel() == 1:  # a gate
            parameter.fill_(0.5)
        elif parameter.ndim > 1:
            parameter.normal_(std=0.2)
        else:  # biases around zero, norms around one (or zero, where the family adds one)
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def tiny_tokenizer(**special: str) -> Any:
    """A tokenizer of the tiny models' 97 tokens: one for each printable ASCII character, newline, and unknown.

    special: further tokens and their names, with the next ids: tiny_tokenizer(image_token="<image>").image_token_id.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **_named(special))


def _named(special: dict[str, str]) -> Fields:
    """Arguments of a tokenizer: the names it knows itself, and the family's own."""
    known = {"bos_token"} & special.keys()
    own = {name: token for name, token in special.items() if name not in known}
    return {name: special[name] for name in known} | {"extra_special_tokens": own}


def image_marker(family: str) -> str:
    """What a prompt of an image-text family says in the place of one image."""
    return _seeing(family).marker


def tiny_processor(family: str) -> Any:
    """The processor of an image-text family for `tiny(family)`: the family's own class, for images of 28 x 28 pixels.

    Its tokenizer is the one of `tiny_tokenizer`, with the family's image tokens added. Videos are not supported.
    """
    import transformers
    from transformers.processing_utils import ProcessorMixin
    from transformers.video_processing_utils import BaseVideoProcessor

    seeing = deepcopy(_seeing(family))
    processor_class = getattr(transformers, seeing.processor)
    if family == "paligemma":
        processor_class = _late_tensors(processor_class)
    parts = dict(
        tokenizer=tiny_tokenizer(**seeing.tokens),
        image_processor=getattr(transformers, seeing.image_processor)(**seeing.image_fields),
    )
    if "video_processor" in processor_class.get_attributes():
        parts["video_processor"] = BaseVideoProcessor()
    # Only videos need what may be missing here: torchvision, and for SmolVLM a package that spells numbers.
    unchecked = patch.object(ProcessorMixin, "check_argument_for_proper_class")
    with unchecked, patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):
        return processor_class(**parts, **seeing.fields)


def _late_tensors(processor_class: Any) -> Any:
    """The class, making torch tensors last: PaliGemma's makes numpy arrays of them, which numpy warns against."""

    class Late(processor_class):
        def __call__(self, *args: Any, return_tensors: str | None = None, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs).convert_to_tensors(return_tensors)

    return Late


def _seeing(family: str) -> _Seeing:
    if family not in _PROCESSORS:
        raise ValueError(f"no processor for family {family!r}: expected one of {sorted(_PROCESSORS)}")
    return _PROCESSORS[family]
