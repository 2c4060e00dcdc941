"""Ways to run a model over a prompt and then token by token: eagerly, compiled, and as a CUDA graph."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmark.fold_cost import synchronize
from examples.benchmark.variants import new_cache


class Runner:
    """Runs a model over a prompt and then token by token, eagerly and with a growing KV cache."""

    def __init__(self, model: nn.Module, max_length: int) -> None:
        self.model = model
        self.call: Callable[..., Any] = model
        self.cache = new_cache(model)

    def reset(self) -> None:
        """Empties the cache."""
        self.cache = new_cache(self.model)

    def advance(self, token_ids: Tensor) -> Tensor:
        """Runs `token_ids`, (B, T), behind what the cache holds; returns the next tokens, (B, 1)."""
        output = self.call(input_ids=token_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)


class CompiledRunner(Runner):
    """The same under torch.compile, with a cache of fixed size."""

    def __init__(self, model: nn.Module, max_length: int) -> None:
        super().__init__(model, max_length)
        self.cache = new_cache(model, max_length)
        self.call = torch.compile(model, dynamic=False)
        self.is_new = True

    def reset(self) -> None:
        self.cache.reset()

    def advance(self, token_ids: Tensor) -> Tensor:
        if self.is_new:  # a cache is laid out outside of compiled code
            self.is_new = False
            self.model(input_ids=token_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache.reset()
        return super().advance(token_ids)


class GraphRunner(Runner):
    """Eager prefill, and decoding as a CUDA graph that is captured at the first token; a cache of fixed size."""

    def __init__(self, model: nn.Module, max_length: int) -> None:
        super().__init__(model, max_length)
        self.cache = new_cache(model, max_length)
        self.graph: torch.cuda.CUDAGraph | None = None

    def reset(self) -> None:
        self.cache.reset()

    def advance(self, token_ids: Tensor) -> Tensor:
        if token_ids.shape[1] > 1:
            return super().advance(token_ids)
        if self.graph is None:
            self._capture(token_ids)
        if token_ids is not self.token:
            self.token.copy_(token_ids)
        self.graph.replay()
        return self.token

    def _capture(self, token_ids: Tensor) -> None:
        self.token = token_ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up here; the round is one to warm up
            for _ in range(2):
                super().advance(self.token)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.token.copy_(super().advance(self.token))


RUNNERS: dict[str, type[Runner]] = {"eager": Runner, "torch.compile": CompiledRunner, "CUDA graphs": GraphRunner}


@torch.inference_mode()
def run_once(runner: Runner, prompt: Tensor, num_steps: int, device: str) -> tuple[float, float]:
    """Seconds of the prefill of `prompt`, and of `num_steps` decoding steps behind it."""
    runner.reset()
    synchronize(device)
    start = time.perf_counter()
    token = runner.advance(prompt)
    synchronize(device)
    middle = time.perf_counter()
    for _ in range(num_steps):
        token = runner.advance(token)
    synchronize(device)
    return middle - start, time.perf_counter() - middle
