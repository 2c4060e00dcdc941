"""What a merge costs: seconds and peak memory of folding EAS adapters in place, on a Llama with random weights.

    python examples/merge_memory.py                                  # Llama of 160M shapes on the CPU
    python examples/merge_memory.py --shape 7b --dtype bfloat16 --device cuda

The peak is what CUDA's allocator reports; on the CPU there is no such count and only the time is measured.
"""

import argparse
import time

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_eas import EASConfig

SHAPES = {
    "160m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="160m")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    with torch.device(arguments.device):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SHAPES[arguments.shape])).eval()
        token_ids = torch.randint(3, 32000, (2, 64))
    torch.set_default_dtype(torch.float32)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    num_layers = model.config.num_hidden_layers

    eas = get_peft_model(model, EASConfig(num_skip=num_layers // 2, context="running", init_weights=False)).eval()
    eas.base_model.fix_skipped_modules(eas.base_model.candidates[num_layers // 4 : num_layers // 4 + num_layers // 2])
    for name, buffer in eas.named_buffers():
        if name.endswith("running_context"):
            buffer.normal_()
    with torch.no_grad():
        unmerged = eas(token_ids).logits.float()
        on_gpu = arguments.device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        merged = eas.merge_and_unload()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        extra = torch.cuda.max_memory_allocated() - before if on_gpu else None
        difference = (merged(token_ids).logits.float() - unmerged).norm() / unmerged.norm()

    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    kept = sum(p.numel() * p.element_size() for p in merged.parameters())
    print(f"Llama {arguments.shape}, {arguments.dtype}, {name}: {num_layers // 2} of {num_layers} attentions skipped")
    print(f"weights before the merge   {weights / 2**20:10.1f} MiB")
    print(f"weights after the merge    {kept / 2**20:10.1f} MiB")
    if extra is not None:
        print(f"extra memory at the peak   {extra / 2**20:10.1f} MiB ({100 * extra / weights:.2f} % of the weights)")
    print(f"time of the merge          {seconds:10.3f} s")
    print(f"relative logits difference {difference.item():10.1e}")


if __name__ == "__main__":
    main()
