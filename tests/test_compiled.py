"""A base that is compiled: in place it is as any other; one that torch.compile has wrapped is refused by name."""

from collections.abc import Callable

import pytest
import torch
from conftest import (
    SKIPS,
    add_eas,
    build_model,
    difference,
    logits,
    make_eas,
    make_inputs,
    mha_names,
    skip_unless_stock_can,
)
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

NEW = 6  # with a prompt of 9 tokens more than twice the sliding window


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def wrap(base: nn.Module, part: str) -> nn.Module:
    """`base` with what torch.compile makes of its `part`, a module's name."""
    if not part:
        return compiled(base)
    base.set_submodule(part, compiled(base.get_submodule(part)))
    return base


@pytest.mark.parametrize(
    ("family", "part"),
    [("llama", ""), ("llama", "model.layers.1"), ("llama", "model.layers.1.mlp"), ("gpt2", "transformer.h.2.attn")],
)
def test_a_wrapped_base_is_refused_and_left_as_it_was(family, part, tmp_path):
    make_eas(family, "cpu", SKIPS["half"]).save_pretrained(tmp_path)
    base = wrap(build_model(family), part)
    before = [(name, type(module)) for name, module in base.named_modules()]
    message = (
        rf"torch\.compile has wrapped {part or 'the model'},.*_orig_mod.*compile what that returns.*\.compile\(\)"
    )
    with pytest.raises(ValueError, match=message):
        add_eas(base, family, SKIPS["half"])
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert [(name, type(module)) for name, module in base.named_modules()] == before


@pytest.mark.parametrize("where", ["the base", "its blocks", "what get_peft_model returns"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_remedies(family, where, tmp_path):
    inputs = make_inputs(family, "cpu")
    size = {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
    skip_unless_stock_can(lambda: logits(torch.compile(build_model(family, **size), backend="eager"), inputs))
    expected = logits(add_eas(build_model(family, **size), family, [0], "running"), inputs)
    base = build_model(family, **size)
    blocks = [base.get_submodule(name.rpartition(".")[0]) for name in mha_names(family, range(2))]
    for module in {"the base": [base], "its blocks": blocks}.get(where, []):
        module.compile(backend="eager")
    model = add_eas(base, family, [0], "running")
    outer = compiled(model) if where.startswith("what") else model
    assert difference(logits(outer, inputs), expected) <= 1e-5
    merged = outer.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), expected) <= 1e-5


def generate_compiled(model: PreTrainedModel, inputs: dict) -> tuple[torch.Tensor, int]:
    """Tokens by a static cache, each step of which is one graph without a break, and the number of graphs."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # by itself generate() compiles on accelerators alone
    options = {"cache_implementation": "static", "compile_config": config}
    return model.generate(**inputs, **options, max_new_tokens=NEW, do_sample=False), len(graphs)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_with_a_static_cache(family):
    """As many graphs as of the stock model: one, or another one for when a sliding window is full."""
    inputs = make_inputs(family, "cpu", length=9)
    of_stock = []
    skip_unless_stock_can(lambda: of_stock.append(generate_compiled(build_model(family), inputs)))
    ((_, expected_graphs),) = of_stock
    assert expected_graphs == {"llama": 1, "gemma3": 2}[family]
    for skip in ("half", "all"):
        merged = make_eas(family, "cpu", SKIPS[skip], "running").merge_and_unload().eval()
        expected = merged.generate(**inputs, max_new_tokens=NEW, do_sample=False, disable_compile=True)
        tokens, graphs = generate_compiled(merged, inputs)
        assert torch.equal(tokens, expected)
        assert graphs == expected_graphs
