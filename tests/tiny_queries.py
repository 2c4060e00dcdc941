"""A tiny classifier of queries in the place of MiniLM and BANKING77, for the examples that tune these."""

import random

import torch
from transformers import BertConfig, BertForSequenceClassification

from examples.shared.minilm import Queries

NUM_LAYERS = 3


class PaddingTokenizer:
    """Of a tokenizer, what makes batches: all samples here have one length."""

    @staticmethod
    def pad(samples: list[dict], return_tensors: str) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}


def tiny_queries() -> Queries:
    def samples(count: int) -> list[dict]:
        draw = random.Random(count)
        rows = [[draw.randrange(20) for _ in range(4)] for _ in range(count)]
        return [{"input_ids": row, "attention_mask": [1] * 4, "labels": row[0] % 2} for row in rows]

    return Queries(PaddingTokenizer(), samples(48), samples(32), samples(40))


def load_tiny_base(*_: object) -> BertForSequenceClassification:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, **shape)).eval()
