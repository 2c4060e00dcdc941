"""The problem `meter`: the small METER of examples.meter, tuned on its VQA task, with 8 candidates in 256 sets.

They are the self- and cross-attentions of two of the six co-attention layers, in both towers.
"""

import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from examples.meter.modeling_meter import MeterForVisualQuestionAnswering
from examples.meter.tasks import meter_vqa
from examples.search_quality.problem import Problem, problem_of
from examples.shared.task import tune
from peft_eas import EASCallback, EASConfig

NUM_SKIP = (3, 4, 5)
CANDIDATES = r".*cross_modal_(text|image)_layers\.(1|4)\.(attention|crossattention)"
BATCH = 16  # questions
NUM_SEARCH, NUM_HELD_OUT = 30, 48


def load_tuned(folder: Path) -> PreTrainedModel:
    """The base, tuned on the task with adapters and nothing skipped, and merged; kept in `folder`."""
    if not (folder / "config.json").is_file():
        task = meter_vqa()
        torch.manual_seed(0)
        model = get_peft_model(task.load_base(), EASConfig(num_skip=0, **task.eas))
        with tempfile.TemporaryDirectory() as outputs:
            tune(model, task, Path(outputs), callbacks=[EASCallback(fit_tokens=0)], progress=False)
        merged = model.merge_and_unload()
        print(f"METER, tuned with nothing skipped: {task.score(merged)}", flush=True)
        merged.save_pretrained(folder)
    return MeterForVisualQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()


def problem(output_dir: Path) -> Problem:
    """The problem. Searches see the questions that the task holds back for it; the scores are of test questions."""
    task = meter_vqa()
    batches = [
        task.collate([data[number] for number in range(first, first + BATCH)])
        for data, count in ((task.reward, NUM_SEARCH), (task.test, NUM_HELD_OUT))
        for first in range(0, BATCH * count, BATCH)
    ]
    settings = {"model": "METER, small", "data": "VQA of easy-VQA", "candidates": CANDIDATES, "batch": BATCH}
    base, file = load_tuned(output_dir / "meter"), output_dir / "meter_losses.jsonl"
    return problem_of(base, batches, NUM_SEARCH, file, settings, target_modules=CANDIDATES)
