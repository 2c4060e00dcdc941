"""Merged folders, as `save_pretrained` writes them, in vLLM's backend for transformers' models.

They run where PEFT_EAS_VLLM_PYTHON names an interpreter that has vLLM; it needs nothing of this package.
"""

import merged_smollm2
import pytest
import torch
import transformers as T
from engines import interpreter, seen, vllm_jobs, vllm_results
from peft import get_peft_model
from torch import nn
from vllm_models import (
    DECODER,
    GEMMA,
    GEMMA3,
    LLAMA,
    MIXED,
    SIZES,
    TOKENS,
    WINDOW,
    WINDOWED,
    Row,
    job,
    merge,
    prompts,
    save,
    tokens,
    without,
    word_tokenizer,
)

from peft_eas import EASConfig

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DEEPSEEK = {
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 32},
    **{"first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
}
FAMILIES = {
    "llama": LLAMA,
    "llama, tied": Row("LlamaForCausalLM", lambda: T.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "mistral": Row("MistralForCausalLM", lambda: T.MistralConfig(**DECODER, sliding_window=WINDOW)),
    "qwen2": Row(
        "Qwen2ForCausalLM",
        lambda: T.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED),
    ),
    "qwen3": Row("Qwen3ForCausalLM", lambda: T.Qwen3Config(**DECODER, head_dim=32)),
    "smollm3": Row("SmolLM3ForCausalLM", lambda: T.SmolLM3Config(**DECODER, no_rope_layer_interval=2)),
    "gemma": Row("GemmaForCausalLM", lambda: T.GemmaConfig(**DECODER, **GEMMA)),
    "gemma2": Row("Gemma2ForCausalLM", lambda: T.Gemma2Config(**DECODER, **WINDOWED)),
    "gemma3": GEMMA3,
    # With more spread, as random output adapters in front of its norms would have it say few tokens.
    "olmo2": Row("Olmo2ForCausalLM", lambda: T.Olmo2Config(**{**DECODER, "initializer_range": 0.3})),
    "phi3": Row("Phi3ForCausalLM", lambda: T.Phi3Config(**DECODER)),
    "starcoder2": Row("Starcoder2ForCausalLM", lambda: T.Starcoder2Config(**DECODER)),
    "mixtral": Row("MixtralForCausalLM", lambda: T.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen3_moe": Row(
        "Qwen3MoeForCausalLM",
        lambda: T.Qwen3MoeConfig(**DECODER, **_EXPERTS, num_experts=4, decoder_sparse_step=2, head_dim=32),
    ),
    "deepseek_v3": Row(
        "DeepseekV3ForCausalLM",
        lambda: T.DeepseekV3Config(**{**DECODER, "num_key_value_heads": 2}, **_EXPERTS, **_DEEPSEEK),
        {"hf_overrides": {"model_type": "deepseek_v3"}},
    ),
    "gpt_neox": Row("GPTNeoXForCausalLM", lambda: T.GPTNeoXConfig(**without(DECODER, "num_key_value_heads"))),
    "opt": Row(
        "OPTForCausalLM",
        lambda: T.OPTConfig(
            **without(DECODER, "num_key_value_heads", "intermediate_size", "initializer_range"),
            **{"ffn_dim": 96, "init_std": 0.3, "word_embed_proj_dim": 64},
        ),
    ),
}
# By what is skipped: the first layer's; the last one's; all but one.
SKIPS = {"half": [0, 2], "last": [3], "all but one": [0, 1, 3]}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_cache_of_every_decoder(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    row = FAMILIES[name]
    merged = {key: merge(row, skip) for key, skip in SKIPS.items()}
    jobs = [job(model, tmp_path / key, **row.options) for key, model in merged.items()]
    results = vllm_jobs(jobs, tmp_path)
    for model, result in zip(merged.values(), results):
        assert result["tokens"] == tokens(model)
    # Two, three and one attentions of four are kept; the others take nothing.
    one = results[2]["bytes_per_token"]
    assert one > 0
    assert [result["bytes_per_token"] for result in results] == [2 * one, 3 * one, one]
    seen("vLLM, transformers backend", row.build().config.model_type)


# vLLM refuses the stock model, for a reason that is not ours.
REFUSED = {
    "gpt2": (
        Row("GPT2LMHeadModel", lambda: T.GPT2Config(**TOKENS, n_embd=64, n_layer=4, n_head=2, n_positions=512)),
        "weights were not initialized from checkpoint",
    ),
    "modernbert": (
        Row(
            "ModernBertForMaskedLM",
            lambda: T.ModernBertConfig(**without(DECODER, "num_key_value_heads"), cls_token_id=1, sep_token_id=2),
        ),
        "Cannot resolve attention scaling expression",
    ),
    "falcon": (
        Row(
            "FalconForCausalLM",
            lambda: T.FalconConfig(
                **without(DECODER, "num_key_value_heads", "intermediate_size"), ffn_hidden_size=96, num_kv_heads=1
            ),
        ),
        "is not compatible with vLLM",
    ),
    "llama4": (
        Row(
            "Llama4ForCausalLM",
            lambda: T.Llama4TextConfig(
                **DECODER, num_local_experts=4, interleave_moe_layer_step=2, intermediate_size_mlp=96, head_dim=32
            ),
        ),
        "size of tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_of_the_stock_model(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    row, reason = REFUSED[name]
    jobs = [job(row.build(), tmp_path / "stock"), job(merge(row, [0, 2], task_type=None), tmp_path / "merged")]
    stock, merged = vllm_results(jobs, tmp_path)
    assert reason in stock["error"]
    assert "error" in merged
    seen("vLLM, transformers backend", row.build().config.model_type, f'The stock model, too: "… {reason} …".')


def test_refusals_of_ours_reach_the_user(tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    names = [f"model.layers.{i}.self_attn" for i in (0, 2)]
    config = EASConfig(task_type="CAUSAL_LM", skipped_modules=names, context="prompt", init_weights=False)
    prompted = get_peft_model(LLAMA.build(), config).merge_and_unload(context="prompt")
    everything = merge(LLAMA, [0, 1, 2, 3])
    latent = merge(FAMILIES["deepseek_v3"], [0])
    jobs = [
        job(model, tmp_path / name) for name, model in (("prompt", prompted), ("all", everything), ("mla", latent))
    ]
    prompted, nothing_left, latent = vllm_results(jobs, tmp_path)
    assert "hf_overrides={'model_type': 'deepseek_v3'}" in latent["error"]
    assert 'merged with context="prompt"' in prompted["error"]
    assert "All attentions of this model are deleted" in nothing_left["error"]


def test_ways_to_run(tmp_path):
    """Compiled; and without being told which implementation to take."""
    interpreter("PEFT_EAS_VLLM_PYTHON")
    model = merge(GEMMA3, [0, 2])
    jobs = [
        job(model, tmp_path / "m", enforce_eager=False),
        job(model, tmp_path / "m", model_impl="auto"),
    ]
    results = vllm_jobs(jobs, tmp_path)
    assert [result["tokens"] for result in results] == [tokens(model)] * 2


def test_tensor_parallel(tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    model = merge(Row("LlamaForCausalLM", lambda: T.LlamaConfig(**{**DECODER, "num_key_value_heads": 2})), [0, 2])
    (result,) = vllm_jobs([job(model, tmp_path / "m", tensor_parallel_size=2)], tmp_path)
    assert result["tokens"] == tokens(model)


# --- encoders --------------------------------------------------------------------------------------------------------

_ENCODER = {**SIZES, **TOKENS, "max_position_embeddings": 130, "initializer_range": 0.15}
ENCODERS = {
    "bert": Row("BertModel", lambda: T.BertConfig(**_ENCODER)),
    "roberta": Row("RobertaModel", lambda: T.RobertaConfig(**_ENCODER)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_of_encoders(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    model = merge(ENCODERS[name], [0, 2], "FEATURE_EXTRACTION")
    asked = prompts(5, 17, 100)
    options = {"model_impl": "transformers", "runner": "pooling", "max_model_len": 120}
    request = {"folder": save(model, tmp_path / "m"), "embed": asked, "options": options}
    word_tokenizer().save_pretrained(tmp_path / "m")  # which vLLM asks for
    (result,) = vllm_jobs([request], tmp_path)
    for prompt, embedding in zip(asked, result["embeddings"]):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt])).last_hidden_state[0, 0]
        assert torch.allclose(torch.tensor(embedding), nn.functional.normalize(hidden, dim=0), atol=1e-5)
    seen("vLLM, transformers backend", name)


# --- a real model ----------------------------------------------------------------------------------------------------


def test_smollm2(tmp_path):
    """Half of the attentions skipped: the tokens of transformers, and half of the base's KV cache."""
    interpreter("PEFT_EAS_VLLM_PYTHON")
    base, tokenizer = merged_smollm2.load()
    folders = {"base": tmp_path / "base", "merged": tmp_path / "merged"}
    base.save_pretrained(folders["base"])
    model = merged_smollm2.merge(base)
    model.save_pretrained(folders["merged"], processing_class=tokenizer)
    tokenizer.save_pretrained(folders["base"])
    asked = merged_smollm2.mixed_prompts(tokenizer)
    assert (len(asked), max(map(len, asked))) == (20, 1500)
    options = {"model_impl": "transformers", "max_model_len": 2048, "max_num_batched_tokens": 2048}
    jobs = [
        {"folder": str(folder), "prompts": asked, "num_tokens": 32, "options": options} for folder in folders.values()
    ]
    of_base, of_merged = vllm_jobs(jobs, tmp_path)
    assert of_merged["tokens"] == [merged_smollm2.greedy(model, prompt, 32) for prompt in asked]
    assert 2 * of_merged["bytes_per_token"] == of_base["bytes_per_token"] > 0
