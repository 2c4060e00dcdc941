"""What vLLM makes of folders; run by the tests with an interpreter that has vLLM.

Usage: vllm_worker.py JOBS.json RESULT.json. A job has `folder`, `options` of vLLM's `LLM`, and what to ask it:
`prompts`, lists of token ids, or texts with their `images`, and `num_tokens`, perhaps with a `lora`, the folder of an
adapter; or `embed`, lists of token ids. A result has `tokens`, `bytes_per_token` of the KV cache and how many tokens
of each prompt were `cached`; or `embeddings`; or an `error`.
"""

import gc
import os
from pathlib import Path
from typing import Any

from worker_jobs import answer

# One process for all folders.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Two workers may share a NUMA node, and all of it with others.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
_DEFAULTS = {
    **{"dtype": "float32", "trust_remote_code": True, "enforce_eager": True, "max_model_len": 512},
    **{"max_num_seqs": 4, "max_num_batched_tokens": 512, "disable_log_stats": True},
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job that fails with no error."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    has_tokenizer = bool(list(Path(job["folder"]).glob("tokenizer*")))
    options = {**_DEFAULTS, "skip_tokenizer_init": not has_tokenizer, **job.get("options", {})}
    llm = LLM(job["folder"], **options)
    if "embed" in job:
        prompts = [{"prompt_token_ids": ids} for ids in job["embed"]]
        return {"embeddings": [output.outputs.data.tolist() for output in llm.encode(prompts, pooling_task="embed")]}
    sampling = SamplingParams(temperature=0.0, max_tokens=job["num_tokens"])
    images = job.get("images") or [None] * len(job["prompts"])
    requests = [_request(*pair) for pair in zip(job["prompts"], images, strict=True)]
    lora = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    outputs = llm.generate(requests, sampling, use_tqdm=False, lora_request=lora)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    cached = [output.num_cached_tokens for output in outputs]
    return {"tokens": tokens, "bytes_per_token": _bytes_per_token(llm), "cached": cached}


def _request(prompt: str | list[int], image: str | None) -> dict[str, Any]:
    request = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    if image is not None:
        from PIL import Image

        request["multi_modal_data"] = {"image": Image.open(image)}
    return request


def _bytes_per_token(llm: Any) -> float:
    """Bytes that one token takes in the KV cache of all layers."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    config = llm.llm_engine.vllm_config
    layers = get_layers_from_vllm_config(config, AttentionLayerBase).values()
    specs = [spec for layer in layers if (spec := layer.get_kv_cache_spec(config)) is not None]
    return sum(spec.page_size_bytes / spec.block_size for spec in specs)


def clean_up() -> None:
    """Frees what the last model took."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


if __name__ == "__main__":
    answer(run, clean_up)
