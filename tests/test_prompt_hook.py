"""The prompt is marked wherever a forward pass enters a model; and what the hook warns of."""

import copy
import warnings

import pytest
import torch
import transformers
from conftest import SKIPS, add_eas, build_model, difference, logits, make_eas, make_inputs, mha_names
from families import ARCHITECTURES
from peft import get_peft_model
from training import SCHEDULE, Sentences, make_trainer
from transformers import DynamicCache

from peft_eas import EASCallback, EASConfig, EASSearch

SCORED, TRAINED, UNPROMPTED = "several tokens without labels", "trains without labels", "labels that leave no prompt"
WAYS = pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
needs_newer_compiler = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 does not compile a stock GPT-2 either"
)


def make(family, device, merged, **options):
    """The base model with adapters in it, or merged with each prompt's own context."""
    model = make_eas(family, device, SKIPS["half"], **options)
    return model.merge_and_unload(context="prompt") if merged else model.get_base_model()


def warned(caught) -> list[str]:
    """Which of the hook's warnings are among those caught."""
    texts = [str(warning.message) for warning in caught]
    return [name for text in texts for name in (SCORED, TRAINED, UNPROMPTED) if name in text]


# --- where a pass may enter ------------------------------------------------------------------------------------------


def small_blip(model_class: str):
    """BLIP-2 or InstructBLIP, whose generate() calls that of the language model inside."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    family = ARCHITECTURES["opt"]
    name = model_class.removesuffix("ForConditionalGeneration")
    config = getattr(transformers, f"{name}Config")(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        qformer_config={**sizes, "encoder_hidden_size": 32, "vocab_size": 61},
        text_config=family.config(),
        num_query_tokens=4,
        image_token_index=60,
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.2 * noise) if parameter.dim() == 1 else parameter.copy_(0.2 * noise)
    return model.eval()


@WAYS
@pytest.mark.parametrize("model_class", ["Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"])
def test_a_language_model_inside_that_generates_by_itself(model_class, merged):
    names = [f"language_model.model.decoder.layers.{i}.self_attn" for i in (0, 2)]
    config = EASConfig(skipped_modules=names, r=8, attention_r=4, dropout=0.0, init_weights=False)
    model = get_peft_model(small_blip(model_class), config).eval()
    model = model.merge_and_unload(context="prompt") if merged else model.get_base_model()
    ids = torch.randint(3, 57, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 4:8], ids[0, :4] = 60, 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["attention_mask"][0, :4] = 0
    if model_class.startswith("Instruct"):
        inputs["qformer_input_ids"] = torch.randint(3, 57, (2, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    together = model.generate(**inputs, **options)
    alone = {
        key: value[:1, 4:] if key in ("input_ids", "attention_mask") else value[:1] for key, value in inputs.items()
    }
    for score, expected in zip(together.scores, model.generate(**alone, **options).scores):
        assert difference(score[:1], expected) <= 1e-6
    mask = inputs["attention_mask"].bool()
    mask[:, 10:] = False
    named = model.generate(**inputs, eas_prompt_mask=mask, **options).scores[0]
    assert difference(named[:, 3:], logits(model, {**inputs, "eas_prompt_mask": mask})[:, -1, 3:]) <= 1e-6
    assert difference(named, together.scores[0]) > 1e-3


@WAYS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_that_trl_reads_off_the_backbone(family, merged, device):
    get_reward = pytest.importorskip("trl.experimental.utils").get_reward
    base = build_model(
        family, device, {"llama": "LlamaForSequenceClassification"}.get(family, "GPT2ForSequenceClassification")
    )
    model = add_eas(base, family, SKIPS["half"], task_type="SEQ_CLS", warm=False)
    model = model.merge_and_unload(context="prompt") if merged else model.get_base_model()
    ids = make_inputs(family, device)["input_ids"]
    ids[0, :3] = 0
    with torch.no_grad():
        together, alone = get_reward(model, ids, 0, 6)[0], get_reward(model, ids[:1, 3:], 0, 3)[0]
    assert difference(together[:1, 3:], alone) <= 1e-5


class Renamed(transformers.LlamaForCausalLM):
    """A model whose tokens go by another name, until they reach its backbone."""

    def forward(self, tokens, **kwargs):
        return super().forward(input_ids=tokens, **kwargs)


def test_tokens_by_another_name_are_found_further_in(device):
    inputs = make_inputs("llama", device)
    inputs["attention_mask"][0, :3] = 0
    expected = logits(make_eas("llama", device, SKIPS["half"], warm=False), inputs)
    base = build_model("llama", device)
    base.__class__ = Renamed
    model = add_eas(base, "llama", SKIPS["half"], warm=False).get_base_model()
    inputs["tokens"] = inputs.pop("input_ids")
    assert torch.equal(logits(model, inputs), expected)


@WAYS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_named_prompt_counts_for_a_part_as_well(family, merged, device):
    model = make(family, device, merged)
    inputs = make_inputs(family, device)
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, 6:] = False
    backbone = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        states = backbone(**inputs, eas_prompt_mask=mask).last_hidden_state
        assert difference(model.lm_head(states), logits(model, {**inputs, "eas_prompt_mask": mask})) <= 1e-6
    assert difference(model.lm_head(states), logits(model, inputs)) > 1e-3


@WAYS
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_pass_that_fails_leaves_no_prompt_behind(family, merged):
    """Falcon's blocks are not told the prompt, but find that of the pass under way."""
    family = ARCHITECTURES[family]
    names = [f"transformer.h.{i}.self_attention" for i in (0, 2)]
    names = names if "falcon" in family.model_class.lower() else mha_names("llama", [0, 2])
    model = get_peft_model(family.build(), EASConfig(skipped_modules=names, r=8, init_weights=False)).eval()
    model = model.merge_and_unload(context="prompt") if merged else model.get_base_model()
    inputs = family.make_inputs()
    backbone = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        expected = backbone(**inputs).last_hidden_state
    other = {**inputs, "eas_prompt_mask": torch.arange(12).expand(2, 12) < 5}

    def fail(*_):
        raise RuntimeError("out of memory")

    for part in (model, backbone):
        handle = backbone.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
            part(**other)
        handle.remove()
        with torch.no_grad():
            assert torch.equal(backbone(**inputs).last_hidden_state, expected)


@WAYS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_is_called_alone_is_refused(family, merged, device):
    model = make(family, device, merged)
    block = model.get_submodule({"llama": "model.layers.2", "gpt2": "transformer.h.2"}[family])
    options = {"position_embeddings": (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))} if family == "llama" else {}
    with pytest.raises(ValueError, match=r"outside of a forward pass.*prompt is not known.*freeze_context"):
        block(torch.randn(1, 5, 32), **options)


@WAYS
def test_a_copy_marks_its_own_prompts(merged, device):
    model = make("llama", device, merged)
    inputs = make_inputs("llama", device)
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        twin = copy.deepcopy(model)
        del model
        assert torch.equal(twin.model(**inputs).last_hidden_state, expected)
    assert twin.generate.func.__self__.model is twin


def test_unloading_takes_the_hook_off_every_part(device):
    model = make_eas("llama", device, SKIPS["half"])
    base = model.unload()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in base.modules())
    assert "generate" not in base.__dict__


@WAYS
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_embeddings_with_ids_of_another_number_in_generate(family, merged):
    """The ids are only what the output begins with."""
    family = ARCHITECTURES[family]
    model = get_peft_model(family.build(), EASConfig(num_skip=4, r=8, init_weights=False))
    model.base_model.fix_skipped_modules(model.base_model.candidates)
    model = model.eval().merge_and_unload(context="prompt") if merged else model.eval().get_base_model()
    inputs = family.make_inputs()
    inputs["attention_mask"][0, :2] = 0
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 4, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        expected = model.generate(**inputs, **options, **more)
        for given in (ids[:, :3], torch.cat([ids, ids[:, :3]], 1)):
            actual = model.generate(input_ids=given, **inputs, **options, **more)
            assert torch.equal(actual, torch.cat([given, expected], 1))


# --- scoring without labels ------------------------------------------------------------------------------------------


def first_answer(model, ids, length, **options):
    """Log-likelihood of the token behind the first `length`."""
    scores = logits(model, {"input_ids": ids, **options})[:, length - 1].log_softmax(-1)
    return scores.gather(1, ids[:, length : length + 1])


@WAYS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_with_a_named_prompt_are_those_of_generate(family, merged, device):
    model = make(family, device, merged)
    ids = make_inputs(family, device)["input_ids"]
    with pytest.warns(UserWarning, match=rf"{SCORED}.*adapters see it.*eas_prompt_mask"):
        leaked = first_answer(model, ids, 6)
    mask = torch.arange(12, device=device).expand(2, 12) < 6
    named = first_answer(model, ids, 6, eas_prompt_mask=mask)
    labels = ids.masked_fill(mask, -100)
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(ids[:, :6], **options).logits[0].log_softmax(-1).gather(1, ids[:, 6:7])
    torch.testing.assert_close(named, generated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first_answer(model, ids, 6, labels=labels), generated, rtol=1e-5, atol=1e-5)
    assert (leaked - generated).abs().max() > 1e-3


@WAYS
def test_scores_by_a_decoder_behind_an_encoder(merged):
    family = ARCHITECTURES["bart"]
    config = EASConfig(num_skip=6, r=8, init_weights=False)
    model = get_peft_model(family.build(), config)
    model.base_model.fix_skipped_modules(model.base_model.candidates[::2])
    model = model.eval().merge_and_unload(context="prompt") if merged else model.eval().get_base_model()
    inputs = family.make_inputs()
    inputs["decoder_input_ids"][:, 0] = 2
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(inputs["input_ids"], **options).logits[0]
    with pytest.warns(UserWarning, match=SCORED):
        leaked = logits(model, inputs)[:, 0]
    mask = torch.arange(7).expand(2, 7) < 1
    assert difference(logits(model, {**inputs, "eas_prompt_mask": mask})[:, 0], expected) <= 1e-5
    assert difference(leaked, expected) > 1e-3


@WAYS
@pytest.mark.parametrize("family", ["falcon", pytest.param("gpt2", marks=needs_newer_compiler)])
def test_a_compiled_model_warns_too_and_stays_in_one_graph(family, merged):
    family = ARCHITECTURES[family]
    model = get_peft_model(family.build(), EASConfig(num_skip=4, r=8, init_weights=False))
    model.base_model.fix_skipped_modules(model.base_model.candidates[::2])
    model = model.eval().merge_and_unload(context="prompt") if merged else model.eval().get_base_model()
    inputs = {**family.make_inputs(), "use_cache": False}
    inputs["attention_mask"][0, -3:] = 0
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    with pytest.warns(UserWarning, match=SCORED):
        actual = logits(compiled, inputs)
    assert difference(actual, logits(model, inputs)) <= 1e-6
    logits(compiled, inputs)
    assert len(graphs) == 1


@WAYS
def test_the_warning_is_given_once_and_where_it_may_matter(merged, device):
    inputs = make_inputs("llama", device)
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    harmless = [
        lambda model: model.generate(**inputs, max_new_tokens=3),
        lambda model: model.train() and model.generate(**inputs, max_new_tokens=3),
        lambda model: model(**inputs, labels=labels),
        lambda model: model(**inputs, logits_to_keep=1),
        lambda model: model(**inputs, use_cache=True),
        lambda model: model(inputs["input_ids"], past_key_values=DynamicCache(config=model.config)),
        lambda model: model(inputs["input_ids"][:, :1]),
        lambda model: model(**inputs, eas_prompt_mask=labels == -100),
        lambda model: model.model(**inputs),  # of a backbone's states nobody reads a score
    ]
    for call in harmless:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            call(make("llama", device, merged))
        assert warned(caught) == []
    model = make("llama", device, merged)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            logits(model, inputs)
    assert warned(caught) == [SCORED]


@WAYS
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_an_encoder_has_no_answer_to_see(family, merged, device):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits(make(family, device, merged), make_inputs(family, device))
    assert warned(caught) == []


def test_neither_has_a_classifier_of_texts_nor_a_frozen_context(device):
    inputs = make_inputs("llama", device)
    base = build_model("llama", device, "LlamaForSequenceClassification")
    models = [add_eas(base, "llama", [1], task_type="SEQ_CLS", warm=False), make_eas("llama", device, [1], "running")]
    for model in models:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits(model, inputs)
        assert warned(caught) == []


# --- labels over the whole text --------------------------------------------------------------------------------------


class WholeTexts(Sentences):
    """Labels as a language-modelling collator makes them."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "labels": sample["input_ids"]}


@pytest.mark.parametrize("data", [WholeTexts, Sentences])
@pytest.mark.parametrize("freeze_context_at", [None, "search_end"])
def test_labels_that_leave_no_prompt_under_trainer(tmp_path, data, freeze_context_at):
    callback = EASCallback(**{**SCHEDULE, "freeze_context_at": freeze_context_at})
    trainer = make_trainer(tmp_path, callback, train_dataset=data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert warned(caught) == ([UNPROMPTED] if data is WholeTexts and freeze_context_at is None else [])


@WAYS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_labels_that_leave_no_prompt_without_a_search(family, merged, device):
    """So the context is the first token's in training and the whole prompt's in generate()."""
    inputs = make_inputs(family, device)
    inputs["attention_mask"][0, :3] = 0
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = make(family, device, merged, warm=False).train()
    with pytest.warns(UserWarning, match=rf"{UNPROMPTED}.*-100.*freeze_context"):
        model(**inputs, labels=labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**inputs, labels=labels)
        other = make(family, device, merged, warm=False).eval()
        other(**inputs, labels=labels)  # an evaluation, whatever the training was
        labels[:, :6] = -100
        other.train()(**inputs, labels=labels)
    assert warned(caught) == []


def test_a_search_that_freezes_the_context_needs_no_prompt(device):
    inputs = make_inputs("llama", device)
    for freeze_context_at, expected in (("search_end", []), (None, [UNPROMPTED])):
        model = get_peft_model(build_model("llama", device), EASConfig(num_skip=2, task_type="CAUSAL_LM", r=8))
        settings = {**SCHEDULE, "freeze_context_at": freeze_context_at}
        search = EASSearch(model, 20, lambda n: 1.0, **settings)
        search.before_step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train()(**inputs, labels=inputs["input_ids"])
        assert warned(caught) == expected
