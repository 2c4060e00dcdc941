"""Greedy continuations of folders in MLX-LM; run by test_export.py.

Usage: mlx_worker.py JOBS.json RESULT.json. A job has `folder`, `prompts`, lists of token ids to be continued by
`num_tokens` or up to the token `end`, and `texts` for the tokenizer, if there are any. A result has `continued`,
`bytes_per_token` of the KV cache, and the `tokens` of the texts; or an `error`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, load_model
from worker_jobs import answer


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job that fails with no error."""
    if job["texts"]:
        model, tokenizer = load(job["folder"], tokenizer_config={"trust_remote_code": True})
        tokens = [tokenizer.encode(text) for text in job["texts"]]
    else:
        (model, _), tokens = load_model(Path(job["folder"])), []
    continued = []
    for prompt in job["prompts"]:
        cache = make_prompt_cache(model)
        continued.append([])
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=job["num_tokens"], prompt_cache=cache):
            continued[-1].append(token)
            if token == job["end"]:
                break
    size = sum(values.nbytes / values.shape[2] for layer in cache for values in layer.state[:2])
    return {"tokens": tokens, "continued": continued, "bytes_per_token": size}


if __name__ == "__main__":
    answer(run)
