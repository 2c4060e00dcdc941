"""What skipping each candidate saves: bytes that are counted by hand, and times of which only the order is tested."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WINDOW, build_model, make_eas, make_inputs
from families import ARCHITECTURES
from peft import get_peft_model
from skippable import Blocks
from torch import nn

from peft_eas import EASConfig
from peft_eas.search import timing
from peft_eas.search.savings import Savings, count_kv_bytes, measure_time, measured_speedup

# Heads of keys and values times their width, twice, in float32; batches of two sequences of twelve tokens.
KV, ROWS, TOKENS = 2 * 8 * 2 * 4, 2, 12


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MOST", 3)


def make(family: str, **options):
    return get_peft_model(ARCHITECTURES[family].build(), EASConfig(num_skip=1, r=8, **options))


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_kv_bytes_of_a_llama() -> None:
    model, inputs = make("llama"), ARCHITECTURES["llama"].make_inputs()
    kv = count_kv_bytes(model, inputs)
    assert kv == ("bytes", 4.0 * KV * ROWS * TOKENS, dict.fromkeys(model.base_model.candidates, KV * ROWS * TOKENS))
    kv = count_kv_bytes(model, inputs, batch_size=5, prompt_tokens=100, new_tokens=28)
    assert set(kv.saved.values()) == {KV * 5 * 128.0}


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "qwen2"])
def test_a_sliding_window_keeps_no_more_than_it_sees(family: str) -> None:
    model, inputs = make(family), ARCHITECTURES[family].make_inputs()
    is_sliding = [True, False, True, False]
    for given, length in (({}, TOKENS), ({"prompt_tokens": 4}, 4), ({"prompt_tokens": 1000, "new_tokens": 24}, 1024)):
        kv = count_kv_bytes(model, inputs, **given)
        # A window of six looks at the token itself and at five that are kept.
        expected = [KV * ROWS * (min(length, WINDOW - 1) if slides else length) for slides in is_sliding]
        assert list(kv.saved.values()) == expected
        assert kv.base == sum(expected)


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_a_cross_attention_keeps_the_encoders_tokens(family: str) -> None:
    model, inputs = make(family), ARCHITECTURES[family].make_inputs()
    encoder_tokens = 10 if family == "whisper" else TOKENS
    heads = 2 * KV  # four, of keys and values
    for new_tokens, own_tokens in ((0, 7), (9, 10)):  # those of the batch; or one to start with, and the new ones
        kv = count_kv_bytes(model, inputs, new_tokens=new_tokens)
        for name, saved in kv.saved.items():
            is_cross = "encoder_attn" in name or "EncDec" in name
            in_encoder = "encoder." in name.replace("decoder.", "")
            tokens = 0 if in_encoder else encoder_tokens if is_cross else own_tokens
            assert saved == heads * ROWS * tokens, name
        num_layers = 3 if family == "t5" else 2
        assert kv.base == num_layers * heads * ROWS * (own_tokens + encoder_tokens)
    if family != "whisper":
        assert count_kv_bytes(model, inputs, prompt_tokens=30).base == num_layers * heads * ROWS * (7 + 30)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bart"])
def test_kv_bytes_are_those_of_a_generation(family: str) -> None:
    """The cache that generate() leaves, without and with attentions skipped, holds the last token but one."""
    spec = ARCHITECTURES[family]
    model, inputs = make(family).eval(), spec.make_inputs()
    own = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    kv = count_kv_bytes(model, own, new_tokens=8)

    def held() -> int:
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
        cache = model.generate(**own, **options).past_key_values
        parts = [cache.self_attention_cache, cache.cross_attention_cache] if family == "bart" else [cache]
        tensors = [t for part in parts for layer in part.layers for t in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    names = list(kv.saved)[1::2]
    assert held() == kv.base
    model.base_model.set_skipped_modules(names)
    assert held() == kv.base - sum(kv.saved[name] for name in names)
    assert count_kv_bytes(model, own, new_tokens=8) == kv


def test_what_has_no_cache_says_so() -> None:
    for family in ("bert", "vit"):
        with pytest.raises(ValueError, match="keeps no KV cache, so that there is nothing to save"):
            count_kv_bytes(make(family), ARCHITECTURES[family].make_inputs())


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "t5", "bart", "llava", "qwen2_5_vl", "clip"])
def test_times_are_parts_of_the_base(family: str, device: str) -> None:
    spec = ARCHITECTURES[family]
    model, inputs = make(family).to(device), spec.make_inputs()  # which it moves to where the model is
    for new_tokens in (0, 3) if spec.kind != "encoder" else (0,):
        savings = measure_time(model, inputs, new_tokens=new_tokens)
        assert list(savings.saved) == model.base_model.candidates
        assert savings.unit == "seconds"
        assert all(0.0 < saved < savings.base for saved in savings.saved.values())
        assert sum(savings.saved.values()) < savings.base
        assert json.loads(json.dumps(savings._asdict())) == savings._asdict()


def test_attentions_that_are_alike_save_the_same() -> None:
    assert len(set(measure_time(make("llama"), ARCHITECTURES["llama"].make_inputs()).saved.values())) == 1
    saved = measure_time(make("gemma3"), ARCHITECTURES["gemma3"].make_inputs(), new_tokens=2).saved
    first, second, third, fourth = saved.values()
    assert (first, second) == (third, fourth)
    assert first != second
    # A cross-attention to the encoder's tokens, and one to the decoder's own.
    saved = measure_time(make("bart"), ARCHITECTURES["bart"].make_inputs()).saved
    assert len({saved[f"model.decoder.layers.0.{name}"] for name in ("self_attn", "encoder_attn")}) == 2
    assert all(saved[f"model.decoder.layers.{i}.encoder_attn"] == list(saved.values())[3] for i in range(2))


class Clock:
    """Advances by what each module is said to take for its input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def add(self, module: nn.Module, seconds) -> None:
        module.register_forward_hook(lambda _, args, output: setattr(self, "now", self.now + seconds(args[0])))


def test_predicts_the_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("llama"), ARCHITECTURES["llama"].make_inputs()
    clock = Clock(monkeypatch)
    for layer in model.get_base_model().model.layers:
        clock.add(layer.self_attn.base_layer.o_proj, lambda x: float(x.shape[1] ** 2))
        clock.add(layer.input_layernorm.base_layer, lambda x: 1.0)
        clock.add(layer.post_attention_layernorm, lambda x: 1.0)
        clock.add(layer.mlp.base_layer.down_proj, lambda x: 10.0)
    first, *_, last = model.base_model.candidates
    for given, attention, passes in (
        ({}, TOKENS**2, 1),
        ({"prompt_tokens": 30}, 30**2, 1),
        ({"prompt_tokens": 5, "new_tokens": 6}, 5**2 + 6 * 1, 7),
    ):
        savings = measure_time(model, inputs, **given)
        assert savings.base == pytest.approx(4 * (attention + 12 * passes))
        assert list(savings.saved.values()) == pytest.approx([attention + passes] * 4)
        expected = 4 * (attention + 12 * passes) / (2 * (attention + 12 * passes) + 2 * 11 * passes)
        assert savings.speedup([first, last]) == pytest.approx(expected)
        assert measured_speedup(model, [first, last], inputs, **given) == pytest.approx((expected,) * 3)


def test_a_norm_that_a_post_norm_block_keeps_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("bert", task_type="SEQ_CLS"), ARCHITECTURES["bert"].make_inputs()
    clock = Clock(monkeypatch)
    for layer in model.get_base_model().bert.encoder.layer:
        clock.add(layer.attention.base_layer.output.LayerNorm, lambda x: 3.0)
        clock.add(layer.attention.base_layer.output.dense, lambda x: 7.0)
    savings = measure_time(model, inputs)
    assert savings.base == 40.0
    assert list(savings.saved.values()) == pytest.approx([7.0] * 4)
    name = model.base_model.candidates[0]
    assert measured_speedup(model, [name], inputs).median == pytest.approx(40 / 33) == savings.speedup([name])


def test_decoding_does_not_call_the_encoders_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So they save time in the prompt's pass alone."""
    model = make("bart", target_modules=r".*\.encoder\..*self_attn")
    clock, base = Clock(monkeypatch), model.get_base_model().model
    for layer in base.encoder.layers:
        clock.add(layer.self_attn.base_layer.out_proj, lambda x: 7.0)
    for layer in base.decoder.layers:
        clock.add(layer.fc2, lambda x: 10.0)
    savings = measure_time(model, ARCHITECTURES["bart"].make_inputs(), new_tokens=3)
    assert savings.base == pytest.approx(2 * 7 + 2 * 10 + 3 * 2 * 10)
    assert list(savings.saved.values()) == pytest.approx([7.0, 7.0])


# --- shapes, and what stays as it was --------------------------------------------------------------------------------


def test_shapes_reach_the_model() -> None:
    model, inputs = make("llama"), ARCHITECTURES["llama"].make_inputs()
    inputs["attention_mask"][:, :3] = 0
    seen: list[tuple] = []
    base = model.get_base_model()
    base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((tuple(kwargs["input_ids"].shape), kwargs["attention_mask"].sum().item())),
        with_kwargs=True,
    )
    measure_time(model, {**inputs, "labels": inputs["input_ids"]})
    assert set(seen) == {((2, 12), 18)}
    seen.clear()
    measure_time(model, inputs, batch_size=3, prompt_tokens=20)
    assert set(seen) == {((3, 20), 60)}
    seen.clear()
    measure_time(model, inputs, batch_size=1, prompt_tokens=5, new_tokens=8)
    assert seen[0] == ((1, 5), 5)
    assert ((1, 9), 9) in seen  # to fill the cache with half of the new tokens
    assert ((1, 1), 10) in seen


def state_of(model: nn.Module) -> list:
    parts = [(part.training, dict(part._forward_hooks), dict(part._forward_pre_hooks)) for part in model.modules()]
    attributes = [sorted(map(str, vars(part))) for part in model.modules()]
    switches = [getattr(part, "_disable_adapters", None) for part in model.modules()]
    weights = [(name, p.requires_grad, p.clone()) for name, p in (*model.named_parameters(), *model.named_buffers())]
    return [parts, attributes, switches, model.base_model.skipped_modules, str(weights)]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_leaves_everything_as_it_was(family: str) -> None:
    model = make_eas(family, "cpu", skip=[], num_skip=2, skipped_modules=None).train()
    inputs, eas = make_inputs(family, "cpu"), model.base_model
    eas.set_skipped_modules(eas.candidates[:1])
    eas.begin_step(eas.candidates[1:3], 0.5)  # as between two calls of a search
    eas.model.get_submodule(eas.candidates[3]).eval()
    next(p for name, p in eas.named_parameters() if "eas_" in name).requires_grad_(False)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before, states = state_of(model), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    measure_time(model, inputs)
    measured_speedup(model, eas.candidates[1:], inputs)
    if family == "llama":
        measure_time(model, inputs, new_tokens=2)
        count_kv_bytes(model, inputs)
    assert state_of(model) == before
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.is_grad_enabled()
    eas.end_step()
    assert eas.skipped_modules == eas.candidates[:1]


def test_an_error_leaves_everything_as_it_was() -> None:
    model, inputs = make("llama").train(), ARCHITECTURES["llama"].make_inputs()
    before, calls = state_of(model), itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == 7:
            raise RuntimeError("out of memory")

    handle = model.get_base_model().model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measured_speedup(model, model.base_model.candidates, inputs, new_tokens=4)
    handle.remove()
    assert state_of(model) == before


def test_measures_the_base_whatever_is_skipped() -> None:
    model, inputs = make_eas("llama", "cpu", skip=[0, 2], context="running"), make_inputs("llama", "cpu")
    calls: list[str] = []
    base = build_model("llama")
    with torch.no_grad():
        expected = base(**inputs).logits[:, -1]
    for name in model.base_model.candidates:
        model.base_model.model.get_submodule(name).base_layer.register_forward_hook(lambda *_: calls.append("MHA"))
    outputs: list[tuple[int, torch.Tensor]] = []

    def note(module, args, output) -> None:
        outputs.append((len(calls), output.logits[:, -1]))
        calls.clear()

    model.get_base_model().register_forward_hook(note)
    measure_time(model, inputs)
    assert {num_calls for num_calls, _ in outputs} == {4, 1}  # with all attentions, and with the first alone
    for num_calls, output in outputs:
        if num_calls == 4:
            torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "t5", "bart", "opt"])
def test_skips_as_a_merge_does(family: str) -> None:
    """What measured_speedup times gives the merged model's outputs, where the adapters add nothing."""
    spec = ARCHITECTURES[family]
    model, inputs = make(family, context="none").eval(), spec.make_inputs()
    names = model.base_model.candidates[1::2]
    with timing.bare(model, model.base_model), timing.skipped(model.base_model, names):
        found = model.get_base_model()(**inputs)["logits"]
    model.base_model.fix_skipped_modules(names)
    with torch.no_grad():
        expected = model.merge_and_unload()(**inputs)["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def measure_on(rank: int, folder: str) -> None:
    """One of two ranks, which look at batches of different lengths."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, inputs = make("llama"), ARCHITECTURES["llama"].make_inputs(length=8 * (rank + 1))
    found = [measure_time(model, inputs, new_tokens=2), count_kv_bytes(model, inputs)]
    found.append(measured_speedup(model, model.base_model.candidates[:1], inputs))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_all_ranks_are_told_what_the_first_has_measured(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(measure_on, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[1][1] == 4 * KV * ROWS * 8


# --- targets, and bad input ------------------------------------------------------------------------------------------


def test_targets() -> None:
    savings = Savings("seconds", 10.0, {"a": 2.0, "b": 3.0})
    assert savings.left(["a"]) == 0.8
    assert savings.speedup(["a", "b"]) == 2.0
    assert savings.for_speedup(1.25) == pytest.approx(2.0)
    assert savings.for_share(0.7) == pytest.approx(3.0)
    with pytest.raises(
        ValueError, match=r"speedup of 2\.1 was asked for, but without all 2 candidates .* 2\.000 times"
    ):
        savings.for_speedup(2.1)
    with pytest.raises(ValueError, match=r"At most 40 % of the base's seconds .* without all 2 candidates 50\.0 %"):
        savings.for_share(0.4)


def test_of_another_skippable_nothing_is_known() -> None:
    with pytest.raises(TypeError, match="of which a Blocks tells nothing"):
        measure_time(Blocks(), {"x": torch.zeros(1, 8)})


def test_bad_input() -> None:
    model, inputs = make("llama"), ARCHITECTURES["llama"].make_inputs()
    with pytest.raises(TypeError, match="without EAS adapters"):
        measure_time(build_model("llama"), inputs)
    with pytest.raises(TypeError, match=r"of type Tensor\. Pass a dictionary"):
        measure_time(model, inputs["input_ids"])
    for name, value in (("batch_size", 0), ("prompt_tokens", 1.5), ("new_tokens", -1)):
        with pytest.raises(ValueError, match=f"{name}={value!r} was received. Give an integer of at least"):
            measure_time(model, inputs, **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value!r} was received"):
            count_kv_bytes(model, inputs, **{name: value})
    with pytest.raises(ValueError, match=r"'model\.layers\.9\.self_attn' is no candidate"):
        measured_speedup(model, ["model.layers.9.self_attn"], inputs)
    with pytest.raises(ValueError, match=r"new_tokens=3 was received, but BertFor.* generates none"):
        measure_time(make("bert"), ARCHITECTURES["bert"].make_inputs(), new_tokens=3)
    with pytest.raises(ValueError, match=r"the batch has no input_ids, only \['pixel_values'\]"):
        measure_time(make("vit"), ARCHITECTURES["vit"].make_inputs(), prompt_tokens=3)
    with pytest.raises(ValueError, match="no first dimension in common"):
        measure_time(make("qwen2_vl"), ARCHITECTURES["qwen2_vl"].make_inputs(), batch_size=3)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"the adapters are merged\. Call unmerge_adapter"):
        measure_time(model, inputs)


def test_a_batch_that_reaches_no_candidate() -> None:
    model = make("llava", target_modules=r".*vision_tower.*self_attn")
    inputs = ARCHITECTURES["llama"].make_inputs()
    with pytest.raises(ValueError, match=r"none of the 4 candidates, such as .*vision_tower.*, is called"):
        measure_time(model, inputs)
