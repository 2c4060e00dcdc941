"""The plan of the package: who may import whom, and what can be imported by which name."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import peft_eas

ROOT = Path(peft_eas.__file__).parent
# Each imports only from those before it, and from itself.
ORDER = [
    *(
        "values",
        "version",
        "peft_type",
        "runtime",
        "architectures",
        "strategies",
        "folding",
        "adapter_file",
        "budgets",
        "config",
        "evaluation",
        "layers",
    ),
    *("injection", "reporting", "merging", "model", "skippable", "recovery", "search", "callback", "export"),
    *("card", "merged", "plots", "__init__", "cli", "__main__"),
]
# Travels with a merged checkpoint to where nothing else is installed.
RUNTIME_NEEDS = {"torch", "transformers", "safetensors", "huggingface_hub"}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    """The package on the first level, or the module there."""
    return parts[0].removesuffix(".py")


def imports(module: Path) -> tuple[set[str], set[str]]:
    """The rooms of the package that a module imports from, and the other packages."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = module.parts[: len(module.parts) - node.level]
            for alias in node.names:
                target = (*base, *(node.module or alias.name).split("."))
                own.add(room(target))
    return own, others


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downwards(module):
    own, others = imports(module)
    here = room(module.parts)
    above = sorted(name for name in own - {here} if ORDER.index(name) >= ORDER.index(here))
    assert not above, f"{module} imports from {above}, which stand above it in ORDER"
    if here == "runtime":
        assert own <= {"runtime"}
        assert others - set(sys.stdlib_module_names) <= RUNTIME_NEEDS


def test_the_order_names_every_room():
    assert {room(module.parts) for module in MODULES} == set(ORDER)


def test_modules_are_short():
    long = {str(module): len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert {name for name, lines in long.items() if lines > 380} <= {"search/loop.py"}


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "peft_eas": [
            *("ARCHITECTURES", "Architecture", "AttentionBandit", "EASCallback", "EASConfig", "EASModel", "EASSearch"),
            *("InputAdapter", "PropagationAdapter", "Skippable", "attention_similarities", "eas_summary"),
            *("count_kv_bytes", "measure_time"),
        ],
        "peft_eas.merged": ["register_family"],
        "peft_eas.plots": ["plot_loss_curve", "plot_search_curve", "plot_skip_map"],
        "peft_eas.card": ["record_speed"],
        "peft_eas.export": ["to_decilm", "to_gguf", "to_vllm"],
    }.items(),
)
def test_documented_names(module, names):
    assert set(names) <= set(dir(importlib.import_module(module)))
