"""What the README says of the models is what the table of architectures says."""

from dataclasses import replace

import readme_models

from peft_eas import ARCHITECTURES

RENEW = "The README's table of models is out of date. Renew it with: python tests/readme_models.py"


def cells(section):
    return [line.strip("| ").split(" | ") for line in section.splitlines()[1:-1]]


def test_the_readme_names_every_block_as_the_table_has_it():
    assert [line[1:] for line in cells(readme_models.in_readme())] == [
        line[1:] for line in cells(readme_models.section())
    ], RENEW


def test_the_readme_names_the_models_as_transformers_does():
    """Another version of transformers may have fewer models, or more."""
    found = readme_models.families_of(ARCHITECTURES)
    for models, block, *_ in cells(readme_models.in_readme())[2:]:
        names = set(models.split(", "))
        assert names & set(found.get(block.strip("`"), names)), RENEW


def test_several_attentions_in_one_block():
    row = ARCHITECTURES["BertLayer"]
    cross = replace(row, mha="crossattention")
    expected = ("self-attention `attention`, cross-attention `crossattention`", "by default")
    assert readme_models.described((row, cross)) == expected
