"""`fit_adapters`: the regression behind it, what it is given, and what it leaves."""

import copy

import families
import pytest
import torch
from conftest import build_model, difference, make_inputs
from families import ARCHITECTURES
from peft import PeftModel, get_peft_model
from skippable import Blocks
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_eas import EASCallback, EASConfig, eas_summary, fit_adapters
from peft_eas.recovery.regression import Moments

# Families in which what an output adapter writes does not add up with the rest of the block.
WITHOUT_SUM = {"gemma2", "gemma3", "gemma3 (image)", "olmo2", "dinov2", "dinov2 (swiglu)"}
NAMES = [name for name, family in ARCHITECTURES.items() if family.num_candidates]


def moments(x: torch.Tensor, y: torch.Tensor, parts: int = 3) -> Moments:
    result = Moments(x.shape[1], y.shape[1], x.device)
    for one, other in zip(x.chunk(parts), y.chunk(parts)):
        result.add(one, other)
    return result


# --- the regression --------------------------------------------------------------------------------------------------


def test_a_map_of_low_rank_is_found():
    torch.manual_seed(0)
    x = torch.randn(500, 12) + 5.0
    left, right, shift = torch.randn(8, 2), torch.randn(2, 12), torch.randn(8)
    y = x @ right.T @ left.T + shift
    update, error = moments(x, y).low_rank_fit(2, ridge=1e-6)
    assert update.left.shape == (8, 2)
    assert update.right.shape == (2, 12)
    torch.testing.assert_close(x @ update.right.T @ update.left.T + update.shift, y, rtol=1e-3, atol=1e-2)
    assert error <= 1e-4 * float(y.square().sum())


def test_the_best_map_of_a_rank_is_found():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = x @ torch.randn(6, 5) + 0.5 * torch.randn(400, 5)
    update, error = moments(x, y).low_rank_fit(2, ridge=1e-6)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    fitted = centred_x @ torch.linalg.lstsq(centred_x, centred_y).solution
    leading = torch.linalg.svd(fitted, full_matrices=False)
    best = leading.U[:, :2] * leading.S[:2] @ leading.Vh[:2]
    actual = x @ update.right.T @ update.left.T + update.shift
    torch.testing.assert_close(actual, best + y.mean(0), rtol=1e-3, atol=1e-3)
    assert error == pytest.approx(float((y - actual).square().sum()), rel=1e-3)


def test_a_ridge_shrinks_and_a_full_rank_is_ridge_regression():
    torch.manual_seed(0)
    x, y = torch.randn(50, 4), torch.randn(50, 3)
    update, _ = moments(x, y).low_rank_fit(3, ridge=0.5)
    centred = x - x.mean(0)
    gram = centred.T @ centred
    expected = torch.linalg.solve(gram + 0.5 * gram.diagonal().mean() * torch.eye(4), centred.T @ (y - y.mean(0)))
    torch.testing.assert_close((update.left @ update.right).T, expected, rtol=1e-3, atol=1e-4)


def test_groups_have_their_own_part_of_the_rank():
    torch.manual_seed(0)
    x, y = torch.randn(300, 6), torch.randn(300, 8)
    update, _ = moments(x, y).low_rank_fit(4, groups=2, ridge=1e-6)
    assert not update.left[:4, 2:].any()
    assert not update.left[4:, :2].any()
    for part in (slice(0, 4), slice(4, 8)):
        alone, _ = moments(x, y[:, part]).low_rank_fit(2, ridge=1e-6)
        actual = (update.left @ update.right)[part]
        torch.testing.assert_close(actual, alone.left @ alone.right, rtol=1e-3, atol=1e-4)


def test_units_that_a_fit_has_no_use_for_begin_as_they_were_drawn():
    torch.manual_seed(0)
    model = get_peft_model(build_model("llama"), EASConfig(num_skip=1, r=80, output_r=40, attention_r=0))
    drawn = copy.deepcopy(model.state_dict())
    fit_adapters(model, [make_inputs("llama", "cpu", batch=8)], progress_bar=False)
    layer = model.base_model.model.model.layers[1].mlp
    pia, output = layer.eas_pia["default"], layer.base_layer.down_proj.eas_output["default"]
    key = "base_model.model.model.layers.1.mlp."
    before = drawn[f"{key}base_layer.down_proj.eas_output.default.down"]
    d = layer.base_layer.down_proj.base_layer.out_features  # 32: the least of both widths
    assert torch.equal(output.down[d:], before[d:])
    assert not torch.equal(output.down[:d], before[:d])
    assert not output.up.weight[:, d:].any()
    before = drawn[f"{key}eas_pia.default.token_down.weight"].unflatten(0, (2, -1))
    after = pia.token_down.weight.unflatten(0, (2, -1))
    assert torch.equal(after[:, d // 2 :], before[:, d // 2 :])
    assert not pia.up[0].weight[:, d // 2 :].any()


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_leave_finite_numbers(tokens):
    x, y = torch.randn(tokens, 6), torch.randn(tokens, 4)
    update, error = moments(x, y, parts=1).low_rank_fit(2)
    assert all(t.isfinite().all() for t in (update.left, update.right, update.shift))
    assert 0 <= error <= float(y.square().sum()) * (1 + 1e-5)


def test_a_large_mean_costs_no_digits():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = x @ torch.randn(6, 3)
    exact, _ = moments(x, y).low_rank_fit(3, ridge=1e-3)
    shifted, _ = moments(x + 1e4, y).low_rank_fit(3, ridge=1e-3)
    torch.testing.assert_close(shifted.left @ shifted.right, exact.left @ exact.right, rtol=1e-2, atol=1e-2)


# --- the model -------------------------------------------------------------------------------------------------------


def fitted(name: str, on_request: bool = False, **options) -> tuple[PeftModel, dict[str, float], float, float]:
    """A family's model with all its MHAs skipped; the errors left; and how far it is off before and after the fit."""
    family = ARCHITECTURES[name]
    names = families.candidates(family, on_request)
    rank = families.output_r(family, on_request)
    defaults = {"r": 16, "output_r": 4 * rank, "attention_r": 0, "dropout": 0.0, "task_type": family.task_type}
    torch.manual_seed(0)
    config = EASConfig(**{**defaults, **options}, skipped_modules=names[1:2], target_modules=names)
    model = get_peft_model(family.build(), config).eval()
    inputs = family.make_inputs(batch=4, seed=99)
    with model.disable_adapter():
        expected = families.output(model, inputs)
    before = (families.output(model, inputs) - expected).norm()
    left = fit_adapters(model, [family.make_inputs(batch=8, seed=i) for i in range(6)], progress_bar=False)
    return model, left, float(before), float((families.output(model, inputs) - expected).norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_block_comes_nearer_to_what_it_was(name):
    model, left, before, after = fitted(name)
    assert list(left) == model.base_model.skipped_modules
    assert all(0 <= value < 1 for value in left.values())
    assert after < before or name in WITHOUT_SUM
    ups = {key: p for key, p in model.named_parameters() if ".eas_output." in key and key.endswith("up.weight")}
    for parameter in ups.values():
        assert bool(parameter.any()) == (name not in WITHOUT_SUM)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
@pytest.mark.parametrize("context", ["prompt", "running", "none"])
def test_a_fitted_model_merges_exactly(name, context):
    family = ARCHITECTURES[name]
    model, *_ = fitted(name, context=context)
    inputs = family.make_inputs(batch=3, seed=1)
    expected = families.output(model, inputs)
    if context == "prompt":  # the fit reads no context yet, so that freezing one changes nothing
        with pytest.warns(UserWarning, match="was of use in no training step"):
            model.base_model.freeze_context()
        assert difference(families.output(model, inputs), expected) <= 1e-5
    assert difference(families.output(model.merge_and_unload(), inputs), expected) <= 1e-5


def test_everything_is_as_it_was_but_for_the_adapters_of_skipped_mhas():
    inputs = make_inputs("llama", "cpu")
    model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4)).train()
    model.base_model.set_skipped_modules(["model.layers.2.self_attn"])
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    random_state = torch.get_rng_state()
    left = fit_adapters(model, [inputs], progress_bar=False)
    assert list(left) == model.base_model.candidates
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert model.config.use_cache
    assert model.peft_config["default"].context == "prompt"
    assert model.base_model.skipped_modules == ["model.layers.2.self_attn"]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(".eas_pia." in key or ".eas_output." in key for key in changed)
    assert not any("running_context" in key or "router" in key for key in changed)


def test_again_is_the_same_whatever_the_adapters_were():
    batches = [make_inputs("llama", "cpu", batch=4)]
    model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4, init_weights=False))
    first = fit_adapters(model, batches, progress_bar=False)
    weights = copy.deepcopy(model.state_dict())
    assert fit_adapters(model, batches, progress_bar=False) == first
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_padding_and_the_batches_behind_enough_do_not_count():
    inputs = make_inputs("llama", "cpu", batch=2)
    inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in inputs.items()}

    def fit(batches, **options):
        torch.manual_seed(0)
        model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4))
        return fit_adapters(model, batches, progress_bar=False, **options)

    expected = fit([inputs])
    assert fit([padded]) == pytest.approx(expected, rel=1e-3)
    count = inputs["input_ids"].numel()
    assert fit(iter([inputs, None]), num_tokens=count) == expected  # the second is not read


def test_groups_under_a_limit_of_memory_give_the_same(monkeypatch):
    def fit():
        torch.manual_seed(0)
        model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4))
        return fit_adapters(model, iter([make_inputs("llama", "cpu", batch=4)]), progress_bar=False)

    expected = fit()
    monkeypatch.setattr("peft_eas.recovery.fit._MOST_BYTES", 1)
    assert fit() == expected


def test_bfloat16_is_fitted_in_float32():
    left = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = get_peft_model(build_model("llama").to(dtype), EASConfig(num_skip=2, r=8, output_r=4))
        left[dtype] = fit_adapters(model, [make_inputs("llama", "cpu", batch=8)], progress_bar=False)
    for name, value in left[torch.float32].items():
        assert left[torch.bfloat16][name] == pytest.approx(value, abs=0.05)


def test_adapters_that_are_off_are_not_fitted():
    model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4, scale=0.0))
    before = copy.deepcopy(model.state_dict())
    assert fit_adapters(model, [make_inputs("llama", "cpu")], progress_bar=False) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_input():
    inputs = make_inputs("llama", "cpu")
    model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4))
    with pytest.raises(TypeError, match="without EAS adapters"):
        fit_adapters(build_model("llama"), [inputs])
    with pytest.raises(TypeError, match="of which a Blocks has none"):
        fit_adapters(Blocks(), [inputs])
    with pytest.raises(TypeError, match=r"a batch of type str\. Pass an iterable of batches"):
        fit_adapters(model, inputs, progress_bar=False)
    with pytest.raises(ValueError, match=r"fit_adapters\(num_tokens=0\): num_tokens must be an integer of at least 1"):
        fit_adapters(model, [inputs], num_tokens=0)
    hidden = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
    for batches in ([], [hidden]):
        with pytest.raises(ValueError, match="4 of 4 attentions were not called, or with hidden tokens alone"):
            fit_adapters(model, batches, progress_bar=False)
    model = get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4, init_weights=False))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError):
        fit_adapters(model, iter([inputs, "text"]), progress_bar=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = get_peft_model(build_model("llama"), EASConfig(skipped_modules=["model.layers.1.self_attn"], r=8))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged, so they cannot be fitted\. Call unmerge_adapter\(\) first"):
        fit_adapters(model, [inputs])


def test_the_summary_and_a_merged_model_tell_what_is_left(tmp_path):
    model, left, *_ = fitted("llama")
    name, error = next(iter(left.items()))
    for _ in range(2):
        summary = eas_summary(model)
        assert [row.fit_error for row in summary.rows] == [error if row.name == name else None for row in summary.rows]
        lines = str(summary).splitlines()
        assert lines[0].split("  ")[0] == "MHA"
        assert "fit error" in lines[0]
        assert f"{100 * error:.0f} %" in next(line for line in lines if line.startswith(name))
        assert len({len(line) for line in lines[: len(summary.rows) + 2]}) == 1
        model = model if summary.rows[1].state == "deleted" else model.base_model.merge_and_unload()
    assert "fit error" not in str(eas_summary(get_peft_model(build_model("llama"), EASConfig(num_skip=1, r=8))))


def test_the_config_keeps_what_is_left(tmp_path):
    model, left, *_ = fitted("llama")
    model.save_pretrained(tmp_path)
    assert EASConfig.from_pretrained(tmp_path).fit_errors == left
    with pytest.raises(ValueError, match="fit_errors must be a dict from names of MHAs to finite numbers, or None"):
        EASConfig(fit_errors={"a": "b"})


# --- under Trainer ---------------------------------------------------------------------------------------------------

SEARCH = {"warmup_steps": 1, "search_steps": 3, "interval": 1, "fit_tokens": 256}


def train(model: PeftModel, tmp_path, callback: EASCallback, resume_from=None) -> dict[str, torch.Tensor]:
    """The adapters as they are when the first step begins."""
    first: dict[str, torch.Tensor] = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 0:
                first.update({key: value.clone() for key, value in model.state_dict().items() if ".eas_" in key})

    samples = [{key: value[0] for key, value in make_inputs("llama", "cpu", seed=i).items()} for i in range(32)]
    samples = [{**sample, "labels": sample["input_ids"]} for sample in samples]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_steps=2
    )
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[callback, Note()])
    trainer.train(resume_from_checkpoint=resume_from)
    return first


def ups(weights: dict[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
    return [value for key, value in weights.items() if f".{kind}." in key and ".up." in key and key.endswith("weight")]


def searched() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(build_model("llama"), EASConfig(num_skip=2, r=8, output_r=4))


def test_a_run_begins_with_the_fit(tmp_path):
    model = searched()
    first = train(model, tmp_path, EASCallback(**SEARCH))
    assert all(value.any() for kind in ("eas_pia", "eas_output") for value in ups(first, kind))
    assert set(model.peft_config["default"].fit_errors) == {f"model.layers.{i}.self_attn" for i in range(4)}
    assert EASConfig.from_pretrained(tmp_path / "checkpoint-4").fit_errors == model.peft_config["default"].fit_errors


def test_by_default_a_run_begins_as_in_the_paper(tmp_path):
    model = searched()
    first = train(model, tmp_path, EASCallback(**{**SEARCH, "fit_tokens": 0}))
    assert not any(value.any() for kind in ("eas_pia", "eas_output") for value in ups(first, kind))
    assert model.peft_config["default"].fit_errors is None
    for value in (-1, 1.5, True, "all"):
        with pytest.raises(ValueError, match=r"fit_tokens must be an integer of at least 1, or 0 for"):
            EASCallback(fit_tokens=value)


def test_the_same_seed_is_the_same_fit_and_the_data_come_as_without_it(tmp_path):
    one, other = (train(searched(), tmp_path / str(i), EASCallback(**SEARCH)) for i in range(2))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    states = []
    for tokens in (0, 64):
        model = searched()
        model.base_model.fix_skipped_modules(model.base_model.candidates[:1])
        train(model, tmp_path / f"fit{tokens}", EASCallback(fit_tokens=tokens))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_trained_adapters_are_left_alone(tmp_path, caplog):
    model = searched()
    train(model, tmp_path / "first", EASCallback(**SEARCH))
    before = {key: value.clone() for key, value in model.state_dict().items() if ".eas_" in key}
    with caplog.at_level("INFO"):
        again = train(model, tmp_path / "second", EASCallback(**SEARCH))
    assert all(torch.equal(value, before[key]) for key, value in again.items())
    assert "no longer as they begin, so they are not fitted" in caplog.text


def test_a_resumed_run_is_not_fitted_again(tmp_path):
    whole = searched()
    train(whole, tmp_path, EASCallback(**SEARCH))
    resumed = searched()
    train(resumed, tmp_path, EASCallback(**SEARCH), str(tmp_path / "checkpoint-2"))
    expected = {key: value for key, value in whole.state_dict().items() if ".eas_" in key}
    actual = {key: value for key, value in resumed.state_dict().items() if ".eas_" in key}
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())
    assert resumed.peft_config["default"].fit_errors == whole.peft_config["default"].fit_errors
    assert resumed.peft_config["default"].fit_errors is not None


def test_a_run_that_cannot_be_fitted_begins_as_the_identity_and_says_so(tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("peft_eas.search.fitting.fit_by_passes", fail)
    model = searched()
    first = train(model, tmp_path, EASCallback(**SEARCH))
    assert not any(value.any() for kind in ("eas_pia", "eas_output") for value in ups(first, kind))
    assert "cannot be fitted to training batches (RuntimeError: out of memory)" in caplog.text


def test_adapters_in_shards_are_refused():
    model = searched()
    layer = model.base_model.model.model.layers[1].mlp
    before = copy.deepcopy(model.state_dict())
    layer.eas_pia["default"].token_down.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"in shards on several ranks.*Call fit_adapters before the model is dist"):
        fit_adapters(model, [make_inputs("llama", "cpu")])
    unchanged = {key: value for key, value in model.state_dict().items() if "layers.1.mlp.eas_pia" not in key}
    assert all(torch.equal(value, before[key]) for key, value in unchanged.items())


def test_a_run_that_is_refused_is_not_fitted(tmp_path):
    model = searched()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing to compute rewards on: the reward_dataset is empty"):
        train(model, tmp_path, EASCallback(**SEARCH, reward_dataset=[]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
