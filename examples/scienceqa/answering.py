"""How a LaVIN model answers ScienceQA: it writes a text, or its logits rank the letters."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from examples.lavin.processing_lavin import LavinProcessor
from examples.lavin.samples import LavinCollator, Sample
from examples.scienceqa.data import LETTERS, ScienceQADataset
from examples.shared.json_lines import append_line, read_lines
from examples.shared.measure import on_device


def num_tokens(dataset: ScienceQADataset, processor: LavinProcessor) -> list[int]:
    """Tokens of each sample, answer and end-of-sequence token included."""
    return [
        len(processor.encode(prompt, is_shown)) + len(processor.encode_answer(prompt, answer)) + 1
        for (prompt, answer), is_shown in zip(dataset.texts, dataset.shown)
    ]


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    dataset: ScienceQADataset,
    processor: LavinProcessor,
    file: Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    title: str = "answers",
) -> list[str]:
    """What the model writes behind each prompt, by greedy decoding of left-padded batches of similar length.

    Each batch's texts go to `file`, if given, a JSON line per problem; what is there is not generated again.
    """
    texts = dict(read_lines(file)) if file is not None else {}
    tokenizer = processor.tokenizer
    lengths = num_tokens(dataset, processor)
    todo = [index for index, problem in enumerate(dataset.problems) if problem.id not in texts]
    todo.sort(key=lengths.__getitem__, reverse=True)  # the longest first: what is too long for the memory shows soon
    with tqdm(total=len(dataset), initial=len(dataset) - len(todo), desc=title, unit="problem") as bar:
        for start in range(0, len(todo), batch_size):
            indices = todo[start : start + batch_size]
            batch = on_device(prompts([dataset[index] for index in indices], processor), model)
            ids = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=processor.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            new = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, new, strict=True):
                texts[dataset.problems[index].id] = text
                if file is not None:
                    append_line(file, [dataset.problems[index].id, text])
            bar.update(len(indices))
    return [texts[problem.id] for problem in dataset.problems]


def prompts(samples: Sequence[Sample], processor: LavinProcessor) -> dict[str, torch.Tensor]:
    """The samples' prompts as a batch to generate from."""
    return LavinCollator(processor, padding_side="left", prompt_only=True)(samples)


@torch.no_grad()
def rank_letters(
    model: nn.Module,
    dataset: ScienceQADataset,
    processor: LavinProcessor,
    batch_size: int = 16,
    title: str = "letters",
) -> list[int]:
    """The choice whose letter is likeliest behind "The answer is", for formats whose output starts with the answer.

    One pass per batch and no text; what a model knows that has not learned the answers' form.
    """
    # The tokens of the answers differ in one place: that of the letter.
    prompt, answer = dataset.texts[0]
    gap = answer[: len(answer) - len(answer.lstrip())]
    ids = [processor.encode_answer(prompt, f"{gap}The answer is {letter}.") for letter in LETTERS]
    place = next((place for place, tokens in enumerate(zip(*ids)) if len(set(tokens)) > 1), None)
    if place is None:
        raise ValueError(
            f"To the tokenizer, 'The answer is {LETTERS[0]}.' is the same as with any other letter, so that letters "
            "cannot be ranked. It must know capital letters; take the one that belongs to the language model."
        )
    letters = torch.tensor([row[place] for row in ids], device=model.device)
    lengths = num_tokens(dataset, processor)
    order = sorted(range(len(dataset)), key=lengths.__getitem__, reverse=True)
    chosen: dict[int, int] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        indices = order[start : start + batch_size]
        batch = on_device(prompts([dataset[index] for index in indices], processor), model)
        begun = torch.tensor(ids[0][:place], device=model.device).expand(len(indices), -1)
        batch["input_ids"] = torch.cat([batch["input_ids"], begun], 1)
        batch["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, place), value=1)
        if "eas_prompt_mask" in batch:
            batch["eas_prompt_mask"] = nn.functional.pad(batch["eas_prompt_mask"], (0, place), value=False)
        logits = model(**batch, logits_to_keep=1).logits[:, -1, letters]
        for index, row in zip(indices, logits, strict=True):
            chosen[index] = int(row[: len(dataset.problems[index].choices)].argmax())
    return [chosen[index] for index in range(len(dataset))]
