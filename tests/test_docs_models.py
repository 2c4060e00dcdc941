"""What docs/models.md says of the models is what the table of architectures says."""

import re
from dataclasses import replace

import docs_models

from peft_eas import ARCHITECTURES

RENEW = "The table of docs/models.md is out of date. Renew it with: python tests/docs_models.py"


def cells(section):
    """The table's rows below its head."""
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]


def text(section):
    """What is no row of the table."""
    return [re.sub(r" \(.*?\)", "", line) for line in section.splitlines() if not line.startswith("| `")]


def test_the_page_names_every_block_as_the_table_has_it():
    assert [line[1:] for line in cells(docs_models.on_page())] == [
        line[1:] for line in cells(docs_models.section())
    ], RENEW


def test_the_page_names_what_does_not_work_and_why():
    assert text(docs_models.on_page()) == text(docs_models.section()), RENEW


def test_the_page_names_the_models_as_transformers_does():
    """Another version of transformers may have fewer models, or more."""
    found = docs_models.families_of(ARCHITECTURES)
    for models, block, *_ in cells(docs_models.on_page()):
        names = set(models.replace("`", "").split(", "))
        assert names & set(found.get(block.strip("`"), names)), RENEW


def test_several_attentions_in_one_block():
    row = ARCHITECTURES["LlamaDecoderLayer"]
    cross = replace(row, attends=("encoder_hidden_states", "encoder_attention_mask"))
    both = ("self-attention `self_attn`, cross-attention `self_attn`", "yes")
    assert docs_models.described((row, cross, replace(row, branch=None))) == both
    tower = replace(row, kind="vision")
    assert docs_models.described(tower)[1] == "without a text model beside them"
    assert docs_models.described((row, tower))[1] == "yes (decoder), without a text model beside them (vision)"
