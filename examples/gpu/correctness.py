"""Whether what must always hold also holds on the device: identity start, exact merge, no leak, generation, training.

In float32, with TF32 off, the device is held against the CPU; differences are relative to the largest value expected.
In bfloat16 an adapted model may be as far from its float32 self as `MARGIN` times what the base without adapters is
from its own, for that is the rounding that nobody can help; there, distances are ‖actual − expected‖ / ‖expected‖.
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available, is_torch_flex_attn_available

from examples.gpu.parts import Case, Clock
from peft_eas import EASCallback, EASConfig
from peft_eas.runtime.prompt import PROMPT_MASK_KEY

# The tiny models are those of the tests.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from conftest import difference
from families import ARCHITECTURES, SPECIAL_TOKENS, Family, candidates, labelled, make, output

FAMILIES = ("llama", "qwen2", "gemma3", "gpt2", "bert", "vit", "llava", "t5", "mixtral")
CONTEXTS = ("running", "prompt")
ACROSS, MERGE, GENERATION, LEAK = 1e-4, 1e-5, 1e-4, 1e-5  # tolerances in float32
MARGIN, LEAST = 3.0, 0.03  # of the tolerance in bfloat16
NEW_TOKENS = 6

# What was compared, the largest difference, the tolerance (None where something was left out, which the text says).
Check = tuple[str, float | None, float | None]
Inputs = dict[str, Tensor]


def cases(device: str, families: Sequence[str] = FAMILIES) -> Callable[[Clock], Iterator[Case]]:
    """The cases of this part, whose figures are lists of `Check`."""

    def make_cases(_: Clock) -> Iterator[Case]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        transformers.utils.logging.set_verbosity_error()
        for name in families:
            yield f"{name}, float32", lambda name=name: float32_checks(ARCHITECTURES[name], device)
        for name in families:
            yield f"{name}, bfloat16", lambda name=name: bfloat16_checks(ARCHITECTURES[name], device)
        for run in (search_checks, attention_checks, autocast_checks, checkpointing_checks, quantised_checks):
            name = run.__name__.removesuffix("_checks").replace("_", " ")
            yield f"llama, {name}", lambda run=run: run(ARCHITECTURES["llama"], device)
        for mode in ("default", "reduce-overhead") if torch.device(device).type == "cuda" else ("default",):
            for kind in ("merged", "merged prompt", "unmerged"):
                yield f"llama, torch.compile {mode}, {kind}", lambda m=mode, k=kind: compile_checks(m, k, device)

    return make_cases


def on(device: str, inputs: Inputs) -> Inputs:
    """The inputs on the device."""
    return {key: value.to(device) for key, value in inputs.items()}


def is_equal(actual: Tensor, expected: Tensor) -> float:
    """0.0 where two tensors are equal bit for bit, else how far they are apart, which is above any tolerance of 0."""
    return 0.0 if torch.equal(actual, expected) else max(difference(actual, expected), 1e-30)


# --- float32 ---------------------------------------------------------------------------------------------------------


def float32_checks(family: Family, device: str) -> list[Check]:
    """All that must hold of one family in float32."""
    given = family.make_inputs(batch=3, seed=1)
    inputs = on(device, given)
    base = family.build().to(device)
    expected = output(base, inputs)
    checks: list[Check] = [("base, device and CPU", difference(expected.cpu(), output(family.build(), given)), ACROSS)]
    model = get_peft_model(base, EASConfig(num_skip=1, r=8, attention_r=4)).eval()
    elsewhere = sum(p.device.type != torch.device(device).type for p in model.parameters())
    checks.append(("adapters that were made elsewhere", float(elsewhere), 0.0))
    checks.append(("identity start", is_equal(output(model, inputs), expected), 0.0))
    model.base_model.set_skipped_modules(candidates(family, False))
    with model.disable_adapter():
        checks.append(("disabled is off", is_equal(output(model, inputs), expected), 0.0))
    checks.append(("unloaded is off", is_equal(output(model.unload(), inputs), expected), 0.0))
    for context in CONTEXTS:
        on_cpu = make(family, "some", context)
        expected = output(on_cpu, given)
        model = on_cpu.to(device)
        actual = output(model, inputs)
        checks.append((f"{context}: device and CPU", difference(actual.cpu(), expected), ACROSS))
        if family.kind == "decoder" and context == "prompt":
            checks.append(("no leak", leak(family, model, device), LEAK))
        merged = copy.deepcopy(model).merge_and_unload(context=context)
        checks.append((f"{context}: merged and unmerged", difference(output(merged, inputs), actual), MERGE))
        checks.append((f"{context}: reloaded and merged", reloaded_difference(merged, inputs), 0.0))
        if family.kind != "encoder":
            for kind, one in (("unmerged", model), ("merged", merged)):
                checks += [(f"{context}, {kind}: {w}", *rest) for w, *rest in generation(family, one, context, device)]
    return checks


def leak(family: Family, model: nn.Module, device: str) -> float:
    """How far an answer token moves the logits before it."""
    before = on(device, labelled(family, family.make_inputs()))
    after = {key: value.clone() for key, value in before.items()}
    after["input_ids"][:, -3] = after["labels"][:, -3] = 5
    return difference(*(output(model, inputs)[:, :-3] for inputs in (after, before)))


def reloaded_difference(merged: transformers.PreTrainedModel, inputs: Inputs) -> float:
    """How far the model is from itself after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        loaded = type(merged).from_pretrained(folder).to(merged.device).eval()
        return is_equal(output(loaded, inputs), output(merged, inputs))


@torch.no_grad()
def generate(model: nn.Module, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy (or beam) sequences, and the logits of each step, (B, steps, vocabulary)."""
    result = model.generate(
        **inputs,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences, torch.stack(result.logits, dim=1)


def generation(family: Family, model: nn.Module, context: str, device: str) -> Iterator[Check]:
    """Every way to generate against greedy generation with a growing cache, and that against one full pass."""
    decodes = family.kind == "decoder"
    inputs = on(device, family.make_inputs(length=9))
    inputs.pop("decoder_input_ids", None)
    options = {"suppress_tokens": SPECIAL_TOKENS} if decodes else {}
    tokens, steps = generate(model, inputs, **options)

    if decodes:
        length = inputs["input_ids"].shape[1]
        whole = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if context == "prompt":
            whole[PROMPT_MASK_KEY] = torch.arange(tokens.shape[1], device=device).expand_as(tokens) < length
        yield "cached and one full pass", difference(steps, output(model, whole)[:, length - 1 : -1]), GENERATION
    for way, changes in (("without a cache", {"use_cache": False}), ("static", {"cache_implementation": "static"})):
        other, logits = generate(model, inputs, **options, **changes)
        yield f"{way} and cached", different_tokens(other, tokens) or difference(logits, steps), GENERATION
    beams, _ = generate(model, inputs, num_beams=2, **options)
    uncached, _ = generate(model, inputs, num_beams=2, use_cache=False, **options)
    yield "beams, cached and not", different_tokens(beams, uncached), 0.0
    if decodes and "pixel_values" not in inputs:
        padded = {key: nn.functional.pad(inputs[key], (3, 0)) for key in ("input_ids", "attention_mask")}
        other, logits = generate(model, padded, **options)
        yield "left padding and none", different_tokens(other[:, 3:], tokens) or difference(logits, steps), GENERATION


def different_tokens(actual: Tensor, expected: Tensor) -> float:
    """The share of tokens that differ; 1 where the lengths do."""
    return 1.0 if actual.shape != expected.shape else (actual != expected).float().mean().item()


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def loaded(family: Family, device: str, **options: Any) -> transformers.PreTrainedModel:
    """The family's base as from_pretrained makes it: `Module.to` would round what stays in float32, as angles do."""
    with tempfile.TemporaryDirectory() as folder:
        family.build().save_pretrained(folder)
        return getattr(transformers, family.model_class).from_pretrained(folder, device_map=device, **options).eval()


def adapted(base: transformers.PreTrainedModel, like: PeftModel) -> PeftModel:
    """The adapters of `like` on another base."""
    model = get_peft_model(base, copy.copy(like.peft_config["default"]))
    set_peft_model_state_dict(model, get_peft_model_state_dict(like))
    return model.eval()


def cast(inputs: Inputs) -> Inputs:
    """The inputs with what is no index in bfloat16."""
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}


def bfloat16_checks(family: Family, device: str) -> list[Check]:
    """Merged and unmerged in bfloat16 against float32."""
    given = family.make_inputs(batch=3, seed=1)
    inputs = cast(on(device, given))
    base = loaded(family, device, dtype=torch.bfloat16)
    rounding = distance(output(base, inputs), output(family.build(), given))
    tolerance = max(LEAST, MARGIN * rounding)
    checks: list[Check] = [("the base's rounding", rounding, None)]
    for context in CONTEXTS:
        exact = make(family, "some", context)
        expected = output(exact, given)
        model = adapted(loaded(family, device, dtype=torch.bfloat16), exact)
        checks.append((f"{context}: unmerged and float32", distance(output(model, inputs), expected), tolerance))
        merged = model.merge_and_unload(context=context)
        checks.append((f"{context}: merged and float32", distance(output(merged, inputs), expected), tolerance))
        checks.append((f"{context}: reloaded and merged", reloaded_difference(merged, inputs), 0.0))
    return checks


# --- what is tried on Llama alone ------------------------------------------------------------------------------------


def attention_checks(family: Family, device: str) -> list[Check]:
    """Every implementation of attention, in bfloat16, against eager attention."""
    has_gpu = torch.device(device).type == "cuda"
    missing = {
        "flash_attention_2": not (has_gpu and is_flash_attn_2_available()) and "flash-attn is not installed",
        "flex_attention": not (has_gpu and is_torch_flex_attn_available()) and "it needs a GPU",
    }
    inputs = on(device, family.make_inputs(batch=3, length=16))
    exact = make(family, "some")
    options = {"dtype": torch.bfloat16}
    model = adapted(loaded(family, device, **options, attn_implementation="eager"), exact)
    expected = output(model, inputs)
    rounding = distance(expected, output(exact, family.make_inputs(batch=3, length=16)))
    tolerance = max(LEAST, MARGIN * rounding)
    checks: list[Check] = []
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        if missing.get(name):
            checks.append((f"{name}: left out, {missing[name]}", None, None))
            continue
        one = adapted(loaded(family, device, **options, attn_implementation=name), exact)
        checks.append((f"{name} and eager", distance(output(one, inputs), expected), tolerance))
        merged = one.merge_and_unload()
        checks.append((f"{name} and eager, merged", distance(output(merged, inputs), expected), tolerance))
    return checks


def autocast_checks(family: Family, device: str) -> list[Check]:
    """A float32 model under autocast to bfloat16, merged and unmerged."""
    inputs = on(device, family.make_inputs(batch=3))
    base = family.build().to(device)
    exact = output(base, inputs)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        rounding = distance(output(base, inputs), exact)
    checks: list[Check] = [("the base's rounding", rounding, None)]
    for context in CONTEXTS:
        model = make(family, "some", context).to(device)
        expected = output(model, inputs)
        for kind, one in (("unmerged", model), ("merged", copy.deepcopy(model).merge_and_unload(context=context))):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                actual = output(one, inputs)
            checks.append((f"{context}, {kind}", distance(actual, expected), max(LEAST, MARGIN * rounding)))
    return checks


def gradients(model: nn.Module, inputs: Inputs) -> Tensor:
    """The gradients of all trained parameters, in one row."""
    model.zero_grad()
    model(**inputs).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])


def checkpointing_checks(family: Family, device: str) -> list[Check]:
    """Gradients with gradient checkpointing, of both kinds, against those without; and those against the CPU's."""
    given = labelled(family, family.make_inputs())
    inputs = on(device, given)
    checks: list[Check] = []
    for context in CONTEXTS:
        model = make(family, "some", context).train()
        on_cpu = gradients(model, given)
        model.to(device)
        plain = gradients(model, inputs)
        checks.append((f"{context}: device and CPU", difference(plain.cpu(), on_cpu), ACROSS))
        model.enable_input_require_grads()
        for reentrant in (True, False):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            actual = gradients(model, inputs)
            checks.append((f"{context}: use_reentrant={reentrant} and none", difference(actual, plain), MERGE))
            model.gradient_checkpointing_disable()
    return checks


def quantised_checks(family: Family, device: str) -> list[Check]:
    """Merging on a base in NF4: into its weights, which adds about the quantisation's own error, and beside them."""
    if not is_bitsandbytes_available():
        return [("left out, bitsandbytes is not installed", None, None)]
    inputs = on(device, family.make_inputs(batch=3))
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    checks: list[Check] = []
    for context in CONTEXTS:
        exact = make(family, "some", context, output_r=0, ffn_r=0).to(device)  # these are folded with each context
        model = adapted(loaded(family, device, quantization_config=config, dtype=torch.float32), exact)
        for module in model.modules():  # where the CPU would repack the weights, and spoil them
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        unmerged = output(model, inputs)
        error = distance(unmerged, output(exact, inputs))
        merged = distance(output(model.merge_and_unload(context=context), inputs), unmerged)
        checks.append((f"{context}: the quantisation's own error", error, None))
        checks.append((f"{context}: merged and unmerged", merged, ACROSS if context == "prompt" else 1.5 * error))
    return checks


def compile_checks(mode: str, kind: str, device: str) -> list[Check]:
    """Compiled, against the same model as it is: one pass, and generation with a static cache.

    On the CPU, where this is a rehearsal, nothing but the tracing is tried.
    """
    family = ARCHITECTURES["llama"]
    has_gpu = torch.device(device).type == "cuda"
    options = {"mode": mode} if has_gpu else {"backend": "aot_eager"}
    model = make(family, "some", "prompt" if "prompt" in kind else "running").to(device)
    if kind != "unmerged":
        model = model.merge_and_unload(context="prompt" if "prompt" in kind else None)
    inputs = on(device, family.make_inputs())
    expected = output(model, inputs)
    tokens, steps = generate(model, inputs, cache_implementation="static")
    compiled = torch.compile(model, **options)
    checks: list[Check] = []
    for number in range(3 if has_gpu else 1):  # the first passes warm up, a later one is a graph's
        actual = output(compiled, inputs).clone()
        checks.append((f"pass {number}", difference(actual, expected), ACROSS))
    if has_gpu:
        compilation = transformers.CompileConfig(mode=mode)
        compiling = {"disable_compile": False, "compile_config": compilation, "cache_implementation": "static"}
        other, logits = generate(model, inputs, **compiling)
        checks.append(("generation", different_tokens(other, tokens) or difference(logits, steps), GENERATION))
    torch._dynamo.reset()
    return checks


# --- a search --------------------------------------------------------------------------------------------------------


def search_checks(family: Family, device: str) -> list[Check]:
    """A short search under Trainer in bfloat16: an interrupted and resumed run ends as one without a break."""
    with tempfile.TemporaryDirectory() as folder:
        whole = _train(family, Path(folder) / "whole", device)
        resumed = _train(family, Path(folder) / "whole", device, resume_from_checkpoint=True)
    sets = [model.base_model.skipped_modules for model in (whole, resumed)]
    weights = [get_peft_model_state_dict(model) for model in (whole, resumed)]
    trained = [difference(weights[1][key], value) for key, value in weights[0].items() if value.any()]
    finite = all(value.isfinite().all() for value in weights[0].values())
    inputs = on(device, family.make_inputs())
    unmerged = output(whole, inputs)
    return [
        ("not skipped in both", float(len(set(sets[0]) ^ set(sets[1]))), 0.0),
        ("weights that are not finite", float(not finite), 0.0),
        ("weights, resumed and not", max(trained), 0.0),
        # Trainer leaves the model under autocast.
        ("merged and unmerged", distance(output(whole.merge_and_unload(), inputs), unmerged), LEAST),
    ]


def _train(family: Family, folder: Path, device: str, **options: Any) -> PeftModel:
    """Twenty steps with a checkpoint at the tenth, in the middle of the search."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (64, 10), generator=generator)
    data = [{"input_ids": row, "labels": row.where(torch.arange(10) > 5, -100)} for row in ids]
    torch.manual_seed(0)
    model = get_peft_model(family.build(), EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4))
    arguments = TrainingArguments(
        str(folder),
        max_steps=20,
        save_steps=10,
        save_total_limit=None,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        bf16=True,
        full_determinism=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=torch.device(device).type == "cpu",
    )
    if options:  # the last checkpoint is the end
        options = {"resume_from_checkpoint": str(folder / "checkpoint-10")}
    callback = EASCallback(search_steps=14, warmup_steps=2, interval=2)
    Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]).train(**options)
    return model.eval()
