"""What comes of a budget: the search decides how many attentions go, and the merged model is held to it.

    python -m examples.compare.budgets                       # a loss that may rise by 2 %, and a speed-up of 1.15
    python -m examples.compare.budgets --tasks meter-vqa --max-loss-increase 0.05

For each task, a model trains until its search is over, with `max_loss_increase`, and another with `target_speedup`.
Half of the task's reward set is for the search. On the other half, the model as it was when the search ended tells the
loss with nothing skipped, with the choice, and with the set that the search would have chosen of one more. The merged
model is then timed against the base, in turns.
"""

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from examples.compare.tasks import TASKS
from examples.shared.measure import markdown_table, quartiles, time_models
from examples.shared.task import Task
from peft_eas import EASConfig, EASSearch, measure_time
from peft_eas.reporting.search_result import increase_text
from peft_eas.search.check import log_increase

Batches = Sequence[dict[str, torch.Tensor]]


def search(task: Task, share: float, seed: int, **budget: float) -> tuple[nn.Module, nn.Module, EASSearch]:
    """Trains until the search is over, after a share of the task's steps.

    Returns the model as it was when the search ended, still with all adapters; the same with its choice; the search.
    """
    torch.manual_seed(seed)
    model = get_peft_model(task.load_base(), EASConfig(**budget, **task.eas)).train()
    own, _ = halves(task)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(task.train, task.batch_size, shuffle=True, collate_fn=task.collate, generator=order)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task.learning_rate)
    finder = EASSearch(
        model,
        task.steps,
        lambda batch: model(**batch).loss,
        own,
        search_steps=share,
        seed=seed,
        savings=lambda: measure_time(model, task.deployed_batch()),
    )
    while True:
        for batch in loader:
            finder.before_step()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            is_last = finder.step + 1 == round(share * task.steps)
            whole = copy.deepcopy(model).eval() if is_last else None
            finder.after_step(loss)
            if is_last:
                whole.base_model.end_step()
                whole.base_model.freeze_context()
                return whole, model.eval(), finder


def halves(task: Task) -> tuple[Batches, Batches]:
    """Batches of the reward set for the search, and others."""
    batches = list(DataLoader(task.reward, task.batch_size, collate_fn=task.collate, drop_last=True))
    return batches[::2], batches[1::2]


@torch.no_grad()
def losses_of(model: nn.Module, names: Sequence[str], batches: Batches) -> list[float]:
    """The loss on each batch with `names` skipped."""
    model.base_model.set_skipped_modules(names)
    return [float(model(**batch).loss) for batch in batches]


def row(task: Task, share: float, rounds: int, seed: int, name: str, value: float) -> tuple[str, ...]:
    """A line of the table."""
    whole, model, finder = search(task, share, seed, **{name: value})
    chosen = model.base_model.skipped_modules
    _, others = halves(task)
    nothing = losses_of(whole, [], others)
    more = finder.strategy.best(min(len(chosen) + 1, len(finder.strategy.candidates)))
    points = [log_increase(nothing, losses_of(whole, names, others)) for names in (chosen, more)]
    stated = next((p for p in finder.state_dict()["measured"] if p["num_skip"] == len(chosen)), None)
    points.insert(0, stated and (stated["increase"], stated["deviation"]))
    rises = ["" if point is None else increase_text(point[0], "log loss", point[1]) for point in points]
    merged = model.merge_and_unload().eval()
    models = {"base": task.load_base().eval(), "merged": merged}
    seconds = time_models(models, task.deployed_batch(), rounds)["prefill"]
    low, median, high = quartiles([base / own for base, own in zip(seconds["base"], seconds["merged"])])
    count = f"{len(chosen)} of {len(finder.strategy.candidates)}"
    before = f"{statistics.fmean(nothing):.4f}"
    return (task.name, f"{name}={value:g}", count, before, *rises, f"{median:.3f} ({low:.3f} to {high:.3f})")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--max-loss-increase", type=float, default=0.02)
    parser.add_argument("--target-speedup", type=float, default=1.15)
    parser.add_argument("--search-steps", type=float, default=0.5, help="share of a task's steps to search for")
    parser.add_argument("--rounds", type=int, default=25, help="paired rounds of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads on the CPU; default: torch's own choice")
    options: Any = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    head = ("task", "budget", "skipped", "loss with none", "rise, stated", "elsewhere", "with one more", "speed-up")
    rows = [head]
    for name in options.tasks:
        for budget in ("max_loss_increase", "target_speedup"):
            value = getattr(options, budget)
            rows.append(row(TASKS[name](), options.search_steps, options.rounds, options.seed, budget, value))
            print(*rows[-1], sep=" | ", flush=True)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
