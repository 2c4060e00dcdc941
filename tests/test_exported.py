"""Formats that other runtimes read give what the merged model gives: ONNX, OpenVINO, torch.export."""

import inspect

import pytest
import torch
from conftest import SKIPS, build_model, difference, make_eas, make_inputs
from engines import seen
from families import ARCHITECTURES, make
from processes import run_alone
from transformers import DynamicCache

exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
NEW = 6  # with a prompt of 9 tokens more than twice the sliding window


def merged_model(family):
    return make_eas(family, "cpu", SKIPS["half"], "running").merge_and_unload().eval()


@pytest.mark.parametrize(
    "family", ["bert", "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma2", "gemma3"]
)
def test_onnx_by_torch(family, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    row = ARCHITECTURES[family]
    merged = make(row, "some").merge_and_unload().eval()
    merged.config.use_cache = False
    example, path = row.make_inputs(), str(tmp_path / "model.onnx")
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    torch.onnx.export(merged, (), path, kwargs=example, dynamic_shapes=axes, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in ((2, 9), (3, 13)):
        inputs = row.make_inputs(batch=batch, length=length, seed=5)
        with torch.no_grad():
            expected = merged(**inputs).logits
        actual = session.run(None, {name: value.numpy() for name, value in inputs.items()})  # one output
        assert difference(torch.from_numpy(actual[0]), expected) <= 1e-5
    seen("ONNX Runtime", family)


def export(model, name, **settings):
    """The graphs of prefill and decoding, with shapes that may change."""
    exporter, config = getattr(exporters, f"{name}Exporter"), getattr(exporters, f"{name}Config")
    inputs = make_inputs("llama", "cpu", length=9)  # as any decoder's here
    return exporter().export_for_generation(model, inputs, config(dynamic=True, **settings))


@torch.no_grad()
def greedy(exported, prompt, cache):
    """Greedy tokens of exported graphs, which take one new token at a time, and the cache in the end."""
    tokens = prompt
    for step in range(NEW):
        graph = exported.runners["decode" if step else "prefill"]
        positions = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
        inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": torch.ones_like(tokens)}
        if step:
            inputs |= {name: inputs[name][:, -1:] for name in ("input_ids", "position_ids")}
        inputs["cache"] = cache
        output = graph(**{name: value for name, value in inputs.items() if name in graph.metadata.kwargs})
        cache = output.cache
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
    return tokens, cache


@pytest.mark.parametrize(
    ("name", "family", "packages"),
    [
        ("Dynamo", "llama", []),
        ("Onnx", "llama", ["onnx", "onnxscript", "onnxruntime"]),
        ("Onnx", "gemma3", ["onnx", "onnxscript", "onnxruntime"]),
        ("OpenVINO", "llama", ["openvino"]),
    ],
)
def test_generation(name, family, packages, tmp_path):
    for package in packages:
        pytest.importorskip(package)
    if not hasattr(exporters, "ExportedModel"):
        pytest.skip("this transformers exports graphs, and does not run them")
    settings = {"stateful": False} if name == "OpenVINO" else {}
    merged = merged_model(family)
    exported = export(merged, name, **settings)
    if name != "Dynamo":  # torch 2.13 loads one with a log message that lacks an argument, for which a test fails
        exported.save_pretrained(tmp_path)
        exported = exporters.ExportedModel.from_pretrained(tmp_path, trust_remote_code=True)
    for batch, length in ((2, 9), (3, 5)):  # of other sizes than the example's, too
        prompt = make_inputs(family, "cpu", batch=batch, length=length, seed=3)["input_ids"]
        expected = merged.generate(prompt, max_new_tokens=NEW, do_sample=False, disable_compile=True)
        tokens, cache = greedy(exported, prompt, DynamicCache(config=merged.config))
        assert torch.equal(tokens, expected)
        assert [layer.keys.numel() == 0 for layer in cache.layers] == [True, False, True, False]


DYNAMIC_CACHE = """
import sys
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.integrations.executorch import export_with_dynamic_cache

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
if sys.argv[1] == "registered":
    register_cache_pytrees_for_model(model)
tokens = torch.arange(1, 10)[None]
try:
    exported = export_with_dynamic_cache(model, tokens[:, :-1], torch.ones_like(tokens[:, :-1]))
except ValueError as error:
    sys.exit(print(error))
inputs = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1]), "use_cache": True}
with torch.no_grad():
    cache = exported.module()(**inputs, cache=DynamicCache(config=model.config)).cache
    step = model(tokens[:, -1:], cache=cache).logits[:, -1] - model(tokens).logits[:, -1]
print(step.abs().max().item())
"""


def test_a_dynamic_cache(tmp_path):
    """What transformers exports it with by default takes no layer but its own, and would lose the length."""
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not say that it exports, so that transformers' own error is shown")
    if "cache" not in inspect.signature(build_model("llama").forward).parameters:
        pytest.skip("this transformers names the cache otherwise")
    merged_model("llama").save_pretrained(tmp_path)
    refused = run_alone(DYNAMIC_CACHE, "as it is", folder=tmp_path)
    assert "skipped attention" in refused
    assert "register_cache_pytrees_for_model(model)" in refused
    assert float(run_alone(DYNAMIC_CACHE, "registered", folder=tmp_path)) <= 2e-5
