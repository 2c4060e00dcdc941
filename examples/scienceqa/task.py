"""ScienceQA as a `Task` for a LaVIN model: which model, which problems, which batches."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.lavin.batches import AnswerCollator, order_by_length
from examples.lavin.modeling_lavin import EAS_ARGUMENTS, LavinForConditionalGeneration
from examples.lavin.processing_lavin import LavinProcessor
from examples.scienceqa.answering import generate_texts, num_tokens, prompts
from examples.scienceqa.data import Problem, ScienceQADataset, read_problems
from examples.scienceqa.scores import accuracies, parse_letter
from examples.shared.smollm2 import load_smollm2
from examples.shared.task import Task

# A letter stands early in an output that starts with the answer, and behind lecture and explanation in others.
NEW_TOKENS, NEW_TOKENS_BEHIND_A_LECTURE = 16, 512


def load_lavin(
    llm: str | None = None,
    lavin: Path | None = None,
    vision: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[LavinForConditionalGeneration, LavinProcessor]:
    """A LaVIN model without adapters, and its processor.

    Args:
        llm: "smollm2", or a Llama checkpoint. lavin: a LaVIN checkpoint, in the place of `llm` and `vision`.
        vision: a CLIP checkpoint whose vision tower looks at the images. None: there is a tower all the same, the
            smallest there can be, with random weights; it is never shown an image.
        seed: of what starts at random.
    """
    if lavin is not None:
        model = LavinForConditionalGeneration.from_pretrained(lavin, dtype=dtype)
        return model.eval(), LavinProcessor.from_pretrained(lavin)
    if llm == "smollm2":
        text_model, tokenizer = load_smollm2(dtype)
    else:
        text_model = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(llm)
    torch.manual_seed(seed)
    if vision is None:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        tower, interval = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=8)).to(dtype), 1
        image_processor = CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    else:
        tower, interval = CLIPVisionModel.from_pretrained(vision, dtype=dtype), 4
        image_processor = CLIPImageProcessorPil.from_pretrained(vision)
    model = LavinForConditionalGeneration.from_parts(text_model, tower, tokenizer, vision_layer_interval=interval)
    return model, LavinProcessor(tokenizer, image_processor, model.config.num_image_tokens)


def split_problems(
    folder: Path, train_split: str, num_reward: int, num_test: int | None = None
) -> dict[str, list[Problem]]:
    """The problems for "train", "reward" and "test"; none is in two of them.

    The reward's are spread evenly over the split "val", and are not trained on where that is part of `train_split`.
    """
    if num_reward < 1:
        raise SystemExit(f"--reward-problems {num_reward}: the search needs at least one.")
    validation = read_problems(folder, "val")
    step = max(1, len(validation) // num_reward)
    reward = validation[::step][:num_reward]
    held = {problem.id for problem in reward}
    return {
        "train": [problem for problem in read_problems(folder, train_split) if problem.id not in held],
        "reward": reward,
        "test": read_problems(folder, "test")[:num_test],
    }


def make_task(
    problems: dict[str, list[Problem]],
    loading: dict[str, Any],
    processor: LavinProcessor,
    *,
    prompt_format: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    r: int = 32,
    attention_r: int = 8,
    seed: int = 0,
) -> Task:
    """ScienceQA as a task for `tune`.

    Args:
        problems: of `split_problems`. loading: arguments of `load_lavin`. processor: the model's.
        max_length: training and reward samples of more tokens are left out; no test problem is.
    """
    sees = loading.get("lavin") is not None or loading.get("vision") is not None
    wording = "scienceqa" if loading.get("lavin") is None else "lavin"  # what its weights were tuned with
    data = {
        part: ScienceQADataset(own, prompt_format, "available" if sees else "none", wording=wording)
        for part, own in problems.items()
    }
    kept, lengths = {}, {}
    for part in ("train", "reward"):
        numbers = num_tokens(data[part], processor)
        fitting = [index for index, number in enumerate(numbers) if number <= max_length]
        kept[part], lengths[part] = Subset(data[part], fitting), [numbers[index] for index in fitting]
        if not fitting:
            raise SystemExit(
                f"--max-length {max_length}: no problem for {part!r} is as short as that; the shortest has "
                f"{min(numbers)} tokens. Give more."
            )
    eas: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": r, "attention_r": attention_r, "dropout": 0.0, "output_r": 0}
    if sees:
        eas |= EAS_ARGUMENTS
    order = order_by_length(lengths["train"], batch_size, steps, seed)
    test = data["test"]

    def score(model: Any) -> dict[str, float]:
        texts = generate_texts(
            model, test, processor, batch_size=2 * batch_size, max_new_tokens=new_tokens(prompt_format)
        )
        letters = [parse_letter(text, problem) for text, problem in zip(texts, test.problems)]
        shares = accuracies(test.problems, letters)
        return {"Avg": shares.pop("Avg"), **{name: share for name, share in shares.items() if share is not None}}

    return Task(
        name="scienceqa",
        load_base=lambda: load_lavin(**loading)[0],
        train=Subset(kept["train"], order),
        reward=kept["reward"],
        test=test,
        collate=AnswerCollator(processor),
        score=score,
        eas=eas,
        lora_targets=r".*language_model.*\.(q_proj|v_proj)",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        deployed_batch=lambda: deployed_batch(test, processor),
    )


def new_tokens(prompt_format: str) -> int:
    """How many tokens are generated to find the letter."""
    return NEW_TOKENS if prompt_format.partition("-")[2].startswith("A") else NEW_TOKENS_BEHIND_A_LECTURE


def deployed_batch(test: ScienceQADataset, processor: LavinProcessor, size: int = 8) -> dict[str, torch.Tensor]:
    """Prompts of the test problems in the middle by length, to measure the speed on."""
    lengths = num_tokens(test, processor)
    order = sorted(range(len(test)), key=lengths.__getitem__)
    start = max(0, (len(order) - size) // 2)
    return prompts([test[index] for index in order[start : start + size]], processor)
