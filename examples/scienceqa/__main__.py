"""Fine-tune LaVIN on ScienceQA, skip half of its attentions, merge, and print the paper's table.

    python -m examples.scienceqa --data DIR                        # SmolLM2-135M, text and captions
    python -m examples.scienceqa --data DIR --llm LLAMA --vision CLIP --format QCM-ALE --dtype bfloat16
    python -m examples.scienceqa --data DIR --lavin LAVIN --format QCM-ALE

DIR is ScienceQA in its official layout: problems.json, pid_splits.json, captions.json, images/SPLIT/ID/image.png
(https://github.com/lupantech/ScienceQA). Without --vision or --lavin no image is shown: each sample is text only
("Image: N/A"), with the image's caption in its context.

The model is tuned twice from the same weights, on the same batches: with adapters at all attentions (nothing skipped),
and with EAS, which searches for the attentions that the task does not need. The loss is taken on the answers alone;
the search is rewarded on problems that neither run trains on. What is merged is reloaded and answers again. Everything
is written to --output-dir; a command that was interrupted goes on from there if it is given again.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, set_seed

from examples.scienceqa.answering import generate_texts, rank_letters
from examples.scienceqa.report import write_report
from examples.scienceqa.scores import parse_letter
from examples.scienceqa.task import load_lavin, make_task, new_tokens, split_problems
from examples.shared.measure import cache_bytes_per_token, num_parameters, on_device, speed_up, time_models
from examples.shared.stages import Stages
from examples.shared.task import Task, plot_search, search_share, tune
from peft_eas import EASCallback, EASConfig

# By how much a step takes longer than its passes, for the search's rewards and for saving.
MARGIN = 1.1
# Whose time is taken.
DECODE_STEPS = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ScienceQA in its official layout")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--llm", default="smollm2", help="smollm2 (default), or a Llama checkpoint")
    source.add_argument("--lavin", type=Path, help="a LaVIN checkpoint, in the place of --llm and --vision")
    parser.add_argument("--vision", help="a CLIP checkpoint; default: none, captions take the images' place")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base's weights")
    parser.add_argument("--format", default="QCM-A", help="of the prompts, such as QCM-A (default) or QCM-ALE")
    parser.add_argument("--train-split", choices=["train", "trainval"], default="train", help="(default train)")
    parser.add_argument("--reward-problems", type=int, default=128, help="of the split val; never trained on")
    parser.add_argument("--test-problems", type=int, help="evaluate on the first so many (default all)")
    parser.add_argument("--skip", type=float, default=0.5, help="share of the language model's MHAs to skip")
    parser.add_argument("--steps", type=int, help="optimizer steps of each of the two runs (default 400)")
    parser.add_argument("--minutes", type=float, help="as many steps as each run has time for, at most --steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--search-steps", type=search_share, default=0.3, help="share of the steps when the search ends"
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters of skipped MHAs")
    parser.add_argument("--attention-rank", type=int, default=16, help="rank of the adapters of kept MHAs")
    parser.add_argument("--max-length", type=int, default=512, help="longer samples are not trained on, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/lavin_scienceqa"))
    parser.add_argument("--quick", action="store_true", help="a smoke test of some minutes: 10 steps, 8 problems")
    arguments = parser.parse_args()
    if arguments.lavin and arguments.vision:
        parser.error("--lavin has a vision tower already; leave --vision out")
    if not 0 < arguments.skip <= 1:
        parser.error(f"--skip {arguments.skip}: must be above 0 and at most 1, a share of the attentions")
    for name in ("test_problems", "reward_problems", "steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if arguments.quick:
        arguments.steps, arguments.test_problems = arguments.steps or 10, arguments.test_problems or 8
    if arguments.steps is None and arguments.minutes is None:
        arguments.steps = 400
    return arguments


class Run:
    """One run of the command: its task, its models, and the folder in which it all is kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.output_dir
        apart = ("output_dir", "device")
        settings = {name: value for name, value in vars(arguments).items() if name not in apart}
        self.stages = Stages(self.folder, json.loads(json.dumps(settings, default=str)))
        self.loading = {
            "llm": arguments.llm,
            "lavin": arguments.lavin,
            "vision": arguments.vision,
            "dtype": getattr(torch, arguments.dtype),
            "seed": arguments.seed,
        }
        model, self.processor = load_lavin(**self.loading)
        self.problems = split_problems(
            arguments.data, arguments.train_split, arguments.reward_problems, arguments.test_problems
        )
        self.task = self.make_task(arguments.steps or 100)
        if arguments.minutes is not None:
            steps = self.stages.run("steps", lambda: self.affordable_steps(model))
            self.task = self.make_task(min(steps, arguments.steps or steps))
        eas = get_peft_model(model, EASConfig(**self.task.eas))
        self.num_mhas = len(eas.base_model.candidates)
        self.num_skip = max(1, round(arguments.skip * self.num_mhas))

    def make_task(self, steps: int) -> Task:
        arguments = self.arguments
        return make_task(
            self.problems,
            self.loading,
            self.processor,
            prompt_format=arguments.format,
            steps=steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            max_length=arguments.max_length,
            r=arguments.rank,
            attention_r=arguments.attention_rank,
            seed=arguments.seed,
        )

    def load_base(self) -> nn.Module:
        return self.task.load_base().to(self.arguments.device)

    # --- training ----------------------------------------------------------------------------------------------------

    def affordable_steps(self, base: nn.Module) -> int:
        """How many steps with nothing skipped a run has the minutes for, from batches of all lengths."""
        model = get_peft_model(base.to(self.arguments.device), EASConfig(**self.task.eas)).train()
        size, train = self.task.batch_size, self.task.train
        batches = [
            self.task.collate([train[index] for index in range(start, start + size)])
            for start in range(0, len(train), size)
        ]
        batches.sort(key=lambda batch: batch["input_ids"].numel())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        places = [len(batches) * tenth // 10 for tenth in (1, 1, 3, 5, 7, 9)]  # the first warms up
        seconds = []
        for place in places:
            batch = on_device(batches[place], model)
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        model.unload()
        each = MARGIN * statistics.mean(seconds[1:])
        steps = max(10, int(60 * self.arguments.minutes / each))
        print(f"A step takes {each:.2f} s with the search's share: {steps} steps in {self.arguments.minutes} minutes.")
        return steps

    def tuned(self, name: str, num_skip: int) -> PeftModel:
        """The base tuned with so many attentions skipped; from its folder, if that is done."""
        folder, base = self.folder / name, self.load_base()
        if f"{name} tuned" in self.stages.done:
            return PeftModel.from_pretrained(base, folder / "adapter").eval()
        set_seed(self.arguments.seed)  # of the adapters' first weights
        model = get_peft_model(base, EASConfig(**self.task.eas, num_skip=num_skip))

        def train() -> dict[str, float]:
            steps, start = self.task.steps, time.perf_counter()
            callback = EASCallback(
                reward_dataset=self.task.reward,
                search_steps=self.arguments.search_steps,
                seed=self.arguments.seed,
                fit_tokens=0,  # the paper's start
            )
            trainer = tune(
                model,
                self.task,
                folder,
                self.arguments.seed,
                [callback],
                train_sampling_strategy="sequential",  # the task's order is one already
                save_strategy="steps",
                save_steps=max(1, steps // 4),
                save_total_limit=1,
                use_cpu=self.arguments.device == "cpu",
            )
            seconds = time.perf_counter() - start
            trainer.save_state()
            model.save_pretrained(folder / "adapter")
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return {"seconds": seconds, "loss": losses[-1], "trainable": num_parameters(model, trainable=True)}

        self.stages.run(f"{name} tuned", train)
        return model.eval()

    # --- what was gained ---------------------------------------------------------------------------------------------

    def evaluate(self, name: str, model: nn.Module) -> dict[str, Any]:
        """The choices that the model names and ranks first, per test problem; None for a text that names none."""
        test, size = self.task.test, 2 * self.task.batch_size
        file, length = self.folder / f"answers_{name.replace(' ', '_')}.jsonl", new_tokens(self.arguments.format)
        start = time.perf_counter()
        texts = generate_texts(model, test, self.processor, file, size, length, name)
        figures = {
            "answers": [parse_letter(text, problem) for text, problem in zip(texts, test.problems)],
            "seconds": time.perf_counter() - start,
        }
        if self.arguments.format.partition("-")[2].startswith("A"):
            figures["ranked"] = rank_letters(model, test, self.processor, size, f"{name}, letters")
        return figures

    def merge(self, eas: PeftModel) -> dict[str, Any]:
        """Merges and saves a model; returns what it skips, and how far its logits are from the unmerged ones'."""
        batch = on_device(self.task.deployed_batch(), eas)
        skipped = list(eas.base_model.skipped_modules)
        with torch.no_grad():
            before = eas(**batch).logits
            merged = eas.merge_and_unload(safe_merge=True)
            difference = (merged(**batch).logits - before).abs().max().item()
        merged.save_pretrained(self.folder / "merged", processing_class=self.processor)
        return {"skipped": skipped, "logits_difference": difference, "largest_logit": before.abs().max().item()}

    def reload(self) -> nn.Module:
        """The merged model, from its folder."""
        folder, dtype = self.folder / "merged", self.loading["dtype"]
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(self.arguments.device).eval()

    def speed(self) -> dict[str, Any]:
        """Times and sizes of base, unmerged and merged model."""
        models = {"base": self.load_base(), "unmerged": self.tuned("eas", self.num_skip), "merged": self.reload()}
        batch = on_device(self.task.deployed_batch(), models["base"])
        seconds = time_models(models, batch, rounds=1 if self.arguments.quick else 15, num_tokens=DECODE_STEPS)
        return {
            "prompts": list(batch["input_ids"].shape),
            "decode_steps": DECODE_STEPS,
            "seconds": seconds,
            "speed_up": {task: {name: speed_up(of, name) for name in models} for task, of in seconds.items()},
            "parameters": {name: num_parameters(model) for name, model in models.items()},
            "cache_bytes_per_token": {name: cache_bytes_per_token(model, batch) for name, model in models.items()},
        }

    def all_stages(self) -> dict[str, Any]:
        """Runs what is not done; returns all figures."""
        run, started = self.stages.run, time.perf_counter()
        run("before tuning", lambda: self.evaluate("before tuning", self.load_base()))
        run("adapters", lambda: self.evaluate("adapters", self.tuned("adapters", 0)))
        run("eas", lambda: self.evaluate("eas", self.tuned("eas", self.num_skip)))
        run("merge", lambda: self.merge(self.tuned("eas", self.num_skip)))
        run("merged", lambda: self.evaluate("merged", self.reload()))
        run("speed", self.speed)
        run("finished", lambda: {"date": datetime.date.today().isoformat(), "seconds": time.perf_counter() - started})
        return self.stages.done


def main() -> None:
    run = Run(parse_arguments())
    task, folder = run.task, run.folder
    shown = "The model sees images" if run.arguments.lavin or run.arguments.vision else (
        "No vision tower was given, so no image is shown: every sample is text only, with captions for images"
    )  # fmt: skip
    data = f"{shown}. Test: {task.test.describe_images()}."
    print(f"{data} {run.num_skip} of {run.num_mhas} attentions are to be skipped; {task.steps} steps.", flush=True)
    figures = run.all_stages()
    report = write_report(folder, figures, task, data, run.num_mhas)
    if run.num_skip < run.num_mhas:
        plot_search(folder)
    print(f"\n{report}\nIt lies in {folder}.")


if __name__ == "__main__":
    main()
