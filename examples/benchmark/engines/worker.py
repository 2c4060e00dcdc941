"""An engine with one model, which generates when it is told to; run by an interpreter that has the engine.

Usage: worker.py ENGINE MODEL OPTIONS, the options as JSON. It answers in lines of JSON: first how many pages its KV
cache has, and how many tokens of one request a page holds; then, for each line {"prompts": lists of token ids,
"num_tokens": n} that it reads, when the tokens came. All prompts of a line are requests that arrive at once, and each
is given all its n tokens.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any, Protocol

# The engine in this process, so that it idles while the others have their turn.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


class Engine(Protocol):
    """What holds a model.

    Attributes:
        pages: of the KV cache, how many there are, and how many tokens each holds.
    """

    pages: tuple[int, int]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        """When each token of each request came, in seconds of `time.perf_counter`."""


class VLLM:
    """vLLM. Its options are those of `vllm.LLM`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        llm = LLM(model, trust_remote_code=True, enable_prefix_caching=False, **options)
        self.engine = llm.llm_engine
        cache = self.engine.vllm_config.cache_config
        self.pages = cache.num_gpu_blocks, cache.block_size

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        """As above."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        times: list[list[float]] = [[] for _ in prompts]
        while self.engine.has_unfinished_requests():
            outputs, now = self.engine.step(), time.perf_counter()
            for output in outputs:
                seen = times[int(output.request_id)]
                seen += [now] * (len(output.outputs[0].token_ids) - len(seen))
        return times


class LlamaCpp:
    """llama.cpp. Its options are `cache_tokens`, `max_requests`, and the number of `threads`.

    Requests that do not fit into the cache wait until the ones before them are done.
    """

    BATCH = 512  # tokens of one pass

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = options["cache_tokens"], options["max_requests"]
        settings.n_batch = settings.n_ubatch = self.BATCH
        settings.n_threads = settings.n_threads_batch = options["threads"]
        settings.kv_unified = True
        # Without it, values are padded to the widest layer, and deleted attentions keep theirs.
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp does not load {model} with {options}.")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(self.BATCH, 0, 1)
        self.pages = options["cache_tokens"], 1

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        """As above."""
        at_once = self.pages[0] // (max(map(len, prompts)) + num_tokens)
        times: list[list[float]] = []
        for start in range(0, len(prompts), at_once):
            times += self._together(prompts[start : start + at_once], num_tokens)
        return times

    def _together(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        times, newest = [], []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), self.BATCH):
                part = prompt[start : start + self.BATCH]
                self._pass([(token, start + i, sequence) for i, token in enumerate(part)])
            newest.append(self._best(len(part) - 1))
            times.append([time.perf_counter()])
        for step in range(num_tokens - 1):
            self._pass([(token, len(prompts[i]) + step, i) for i, token in enumerate(newest)])
            newest, now = [self._best(i) for i in range(len(newest))], time.perf_counter()
            for seen in times:
                seen.append(now)
        return times

    def _pass(self, tokens: list[tuple[int, int, int]]) -> None:
        """One pass over tokens, each with its position and the number of its sequence."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            is_last = i + 1 == len(tokens) or tokens[i + 1][2] != sequence
            self.batch.logits[i] = is_last
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError("llama.cpp found no place in its cache, or failed.")

    def _best(self, index: int) -> int:
        """The likeliest token behind the token `index` of the last pass."""
        import numpy

        logits = self.api.llama_get_logits_ith(self.context, index)
        row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(numpy.ctypeslib.as_array(row, shape=(self.vocabulary,)).argmax())


ENGINES: dict[str, type[Engine]] = {"vllm": VLLM, "llama.cpp": LlamaCpp}


def main() -> None:
    """Answers, until there is nothing more to read."""
    name, model, options = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print, too
    engine = ENGINES[name](model, json.loads(options))
    print(json.dumps(engine.pages), file=answers)
    for line in sys.stdin:
        start = time.perf_counter()
        times = engine.generate(**json.loads(line))
        print(json.dumps([[now - start for now in request] for request in times]), file=answers)


if __name__ == "__main__":
    main()
