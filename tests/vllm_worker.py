"""Greedy tokens of a folder in vLLM; run by test_export.py with an interpreter that has vLLM.

Usage: vllm_worker.py FOLDER PROMPTS.json NUM_TOKENS RESULT.json; prompts and results are lists of token ids.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    """Writes the new tokens of each prompt, without the one that ends the text."""
    from vllm import LLM, SamplingParams

    folder, prompts, num_tokens, result = sys.argv[1:]
    llm = LLM(
        folder,
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=True,
        skip_tokenizer_init=not list(Path(folder).glob("tokenizer*")),
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=512,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=int(num_tokens))
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    outputs = [output.outputs[0] for output in llm.generate(inputs, sampling, use_tqdm=False)]
    Path(result).write_text(json.dumps([list(output.token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
