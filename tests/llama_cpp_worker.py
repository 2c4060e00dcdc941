"""Tokens and greedy continuations of a GGUF file in llama.cpp; run by test_export.py.

Usage: llama_cpp_worker.py FILE REQUEST.json RESULT.json. The request has `texts` to be split into tokens, `prompts`
(lists of token ids) to be continued by `num_tokens`, and `messages` for the chat template.
"""

import json
import sys
from pathlib import Path

import llama_cpp

F32 = 0  # ggml's number of the type


def continued(llama: llama_cpp.Llama, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation, up to and with the token that ends the text."""
    llama.reset()
    tokens = []
    for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0, reset=False):
        tokens.append(token)
        if len(tokens) == num_tokens or llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
            return tokens
    return tokens


def main() -> None:
    """Answers the request."""
    file, request, result = sys.argv[1:]
    asked = json.loads(Path(request).read_text())
    kv = {"type_k": F32, "type_v": F32}  # float16 by default
    llama = llama_cpp.Llama(file, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=False, **kv)
    answer = {
        "metadata": llama.metadata,
        "tokens": [llama.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]],
        "pieces": [llama.detokenize(ids, special=True).decode(errors="replace") for ids in asked["prompts"]],
        "continued": [continued(llama, ids, asked["num_tokens"]) for ids in asked["prompts"]],
        "ends": [llama.token_bos(), llama.token_eos()],
    }
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
