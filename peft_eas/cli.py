"""The command line: `peft-eas`, or `python -m peft_eas`. Thin: each command calls what a script would call.

Exit codes: 0; 1 with one sentence for what the library refuses or does not find; 2 for wrong usage.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import find_adapter_config_file

from .config import EASConfig
from .export import to_decilm, to_gguf
from .reporting.card import AUTO_CLASSES, write_adapter_card, write_merged_card
from .reporting.plots import plot_loss_curve, plot_result, plot_search_curve, plot_skip_map, read_search
from .reporting.provenance import hub_id_of
from .reporting.summary import eas_summary

# The Auto classes that load a base for each of PEFT's task types.
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "SEQ_CLS": (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "FEATURE_EXTRACTION": ("AutoModel",),
}
# The files of tokenizers and processors.
PROCESSING_FILES = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "normalizer.json",
    "*process*.json",
    "*chat_template*",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` (default: the process's) name; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"peft-eas {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


# --- the commands ----------------------------------------------------------------------------------------------------


def _merge(options: argparse.Namespace) -> None:
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise ValueError(f"{options.out} is not empty. Name a folder that is empty or does not exist yet.")
    _tell(f"Loading {options.adapter} on {options.base}")
    model = _load_adapter(options.adapter, options.base, options.num_labels, options.dtype, options.device)
    _tell(f"Merging: {len(model.base_model.skipped_modules)} attentions are deleted")
    merged = model.merge_and_unload(progressbar=True, safe_merge=options.safe_merge, context=options.context)
    _tell(f"Saving to {options.out}")
    merged.save_pretrained(options.out)
    for source in (options.base, options.adapter):  # the adapter's are those that it was trained with
        _copy_processing_files(source, options.out)
    print(options.out)


def _summary(options: argparse.Namespace) -> None:
    print(eas_summary(_load_without_weights(options), options.context_length))


def _plot(options: argparse.Namespace) -> None:
    folder = options.output_dir or (options.path if options.path.is_dir() else options.path.parent)
    try:
        search = read_search(options.path)
    except FileNotFoundError:  # an adapter or a merged model keeps what was found, but not the course of the search
        for picture in plot_result(options.path, folder):
            print(picture)
        _tell("No search curve: only the output_dir of the run and its checkpoints know the course of the search.")
        return
    print(plot_skip_map(options.path, folder / "skip_map.png"))
    print(plot_search_curve(options.path, folder / "search_curve.png", options.values))
    if search.result.curve is not None:
        print(plot_loss_curve(options.path, folder / "loss_curve.png"))


def _export(options: argparse.Namespace) -> None:
    _tell(f"Exporting {options.merged}")
    if options.format == "gguf":
        print(to_gguf(options.merged, None, options.out, options.dtype))
    else:
        print(to_decilm(options.merged, options.out))


def _card(options: argparse.Namespace) -> None:
    if not Path(options.path).is_dir():
        raise ValueError(f"{options.path} is not a folder. Name the one in which the adapter or merged model lies.")
    model = _load_without_weights(options)
    write = write_adapter_card if isinstance(model, PeftModel) else write_merged_card
    write(model, options.path)
    print(Path(options.path, "README.md"))


# --- what they load --------------------------------------------------------------------------------------------------


def _load_adapter(
    adapter: str, base: str | None, num_labels: int | None, dtype: str = "auto", device: torch.device | None = None
) -> PeftModel:
    """An adapter on its base; without `device` a model that has shapes and no values, for which no weight is read."""
    _check_exists(adapter)
    adapter_config = EASConfig.from_pretrained(adapter)
    base = base or adapter_config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name its base model. Name it with --base.")
    _check_exists(base)
    config = AutoConfig.from_pretrained(base, **({} if num_labels is None else {"num_labels": num_labels}))
    auto_class = _auto_class_of_base(config, adapter_config)
    if device is None:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    else:
        has_new_head = num_labels is not None
        model = auto_class.from_pretrained(base, config=config, dtype=dtype, ignore_mismatched_sizes=has_new_head)
        model.to(device)
    if Path(adapter, "tokenizer_config.json").is_file():  # as PEFT's AutoPeftModel does
        num_tokens = len(AutoTokenizer.from_pretrained(adapter))
        if num_tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(num_tokens)
    place = "cpu" if device is None else str(device)
    try:
        return PeftModel.from_pretrained(model, adapter, torch_device=place, low_cpu_mem_usage=device is None)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"The adapter {adapter} does not fit {base} ({str(error).splitlines()[1].strip()}). If it has a new "
            "head, give its number of classes as --num-labels; if not, name the base that it was trained on."
        ) from error


def _load_without_weights(options: argparse.Namespace) -> PeftModel | PreTrainedModel:
    """The adapter or the merged model at `options.path`, with shapes and no values."""
    _check_exists(options.path)
    if find_adapter_config_file(options.path) is not None:
        return _load_adapter(options.path, options.base, options.num_labels)
    is_model = not Path(options.path).is_dir() or Path(options.path, "config.json").is_file()
    config = AutoConfig.from_pretrained(options.path) if is_model else None
    if not isinstance(getattr(config, "eas", None), dict):
        raise ValueError(
            f"{options.path} holds neither an EAS adapter nor a model that was merged with one. Name the folder that "
            "the adapter's or the merged model's save_pretrained() has written."
        )
    auto_class = _auto_class(config, [*AUTO_CLASSES, "AutoModel"], config.architectures or [])
    with torch.device("meta"):
        return auto_class.from_config(config)


def _check_exists(name: str) -> None:
    if not Path(name).is_dir() and hub_id_of(name) is None:
        raise ValueError(f"{name} is no folder, and cannot be a model's name on the Hub. Check the path.")


def _auto_class_of_base(config: PreTrainedConfig, adapter_config: EASConfig) -> Any:
    """The Auto class that loads the base: by the adapter's task type, else by the class that it was trained on."""
    if adapter_config.task_type is not None:
        return _auto_class(config, TASKS[adapter_config.task_type], config.architectures or [], by_name=False)
    trained_on = (adapter_config.auto_mapping or {}).get("base_model_class")
    names = [trained_on] if trained_on else config.architectures or []
    return _auto_class(config, [*AUTO_CLASSES, "AutoModel"], names)


def _auto_class(
    config: PreTrainedConfig, auto_classes: Sequence[str], names: Sequence[str], by_name: bool = True
) -> Any:
    """The first of the Auto classes that knows one of the model classes `names` for a config of this kind.

    Without `by_name`, the first that knows any class for it, if none knows one of these.
    """
    fallback = None
    for auto_class in (getattr(modeling_auto, name) for name in auto_classes):
        known = auto_class._model_mapping.get(type(config), ())
        known = known if isinstance(known, (tuple, list)) else (known,)
        if any(one.__name__ in names for one in known):
            return auto_class
        fallback = fallback or (auto_class if known else None)
    if fallback is None or by_name:
        raise ValueError(
            f"None of the classes {', '.join(auto_classes)} loads {' or '.join(names) or 'a model'} of the type "
            f"{config.model_type!r}. Load and merge it in a script, with the class that it was trained with."
        )
    return fallback


def _copy_processing_files(source: str, out: Path) -> None:
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(PROCESSING_FILES)))
    for path in (path for pattern in PROCESSING_FILES for path in folder.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, out / path.name)


def _tell(text: str) -> None:
    """Progress, which is not the result, goes to stderr."""
    print(f"{text} ...", file=sys.stderr)


# --- arguments -------------------------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    try:
        return torch.ones(1, device=name).cpu() and torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({str(error).splitlines()[0]})") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-eas",
        description="Merge, look at, export and describe models that were tuned with Efficient Attention Skipping.",
        epilog="`peft-eas COMMAND --help` explains a command and gives an example.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    merge = _command(
        commands,
        "merge",
        _merge,
        "delete the skipped attentions, fold the adapter, and save a plain checkpoint",
        "peft-eas merge HuggingFaceTB/SmolLM2-135M outputs/adapter my-model --dtype bfloat16",
        "The tokenizer or processor is copied along: the base's files, then those that lie beside the adapter.",
    )
    merge.add_argument("base", metavar="BASE", help="the base model: a folder, or its name on the Hub")
    merge.add_argument("adapter", metavar="ADAPTER", help="the EAS adapter: a folder, or its name on the Hub")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to write; it must be empty or not exist yet")
    merge.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as the base's)")
    merge.add_argument("--device", type=_device, default="cpu", help="where to merge, such as cuda (default: cpu)")
    merge.add_argument(
        "--context",
        choices=("running", "prompt"),
        help="running (the default) folds the adapters; prompt keeps them as two thin factors that read each prompt",
    )
    merge.add_argument("--safe-merge", action="store_true", help="look for NaN and infinity in the adapter first")
    _add_num_labels(merge)

    summary = _command(
        commands,
        "summary",
        _summary,
        "a table of every attention: its state, score and size, and what skipping it saves",
        "peft-eas summary outputs/adapter",
        "Only configs and the adapter are read, no weights of the base.",
    )
    _add_path_and_base(summary)
    summary.add_argument(
        "--context-length", type=int, help="tokens that a token attends to, for FLOPs (default: 1024, or an image's)"
    )

    plot = _command(
        commands,
        "plot",
        _plot,
        "draw which attentions are skipped, the course of the search, and what skipping costs",
        "peft-eas plot outputs/checkpoint-500 --output-dir pictures",
        "Writes skip_map.png, search_curve.png, and loss_curve.png, which the bandit does not have. An adapter or a "
        "merged model gives no search_curve.png, as it keeps what was found, and not how.",
    )
    plot.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="the output_dir of a run, a checkpoint, an eas_search.json, an adapter, or a merged model",
    )
    plot.add_argument("--output-dir", type=Path, help="where to write (default: PATH)")
    plot.add_argument(
        "--values",
        choices=("scores", "probabilities"),
        default="scores",
        help="of the bandit: what the search curve shows (default: scores)",
    )

    export = commands.add_parser(
        "export",
        help="write a merged model in the format of another engine",
        description="Write a merged model in the format of another engine.",
    )
    formats = export.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, old, what, example in (
        ("decilm", ["vllm"], "a folder in DeciLM's layout, for vLLM and MLX-LM", "my-model my-model-decilm"),
        ("gguf", [], "a file for llama.cpp; needs `pip install gguf`", "my-model my-model.gguf --dtype q8_0"),
    ):
        one = _command(formats, name, _export, what, f"peft-eas export {name} {example}", aliases=old)
        one.add_argument("merged", metavar="MERGED", help="folder of a merged model, with its tokenizer")
        one.add_argument("out", metavar="OUT", type=Path, help="what to write")
    one.add_argument(
        "--dtype",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="of embedding and projections (default: as they are)",
    )

    card = _command(
        commands,
        "card",
        _card,
        "write the model card of an adapter or a merged model again",
        "peft-eas card my-model",
        "Renews README.md and the picture of the skip map in PATH. Your own text and front matter stay.",
    )
    _add_path_and_base(card)
    return parser


def _command(
    commands: Any, name: str, run: Any, what: str, example: str, more: str = "", aliases: Sequence[str] = ()
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        aliases=aliases,
        help=what,
        description=textwrap.fill(f"{what[0].upper()}{what[1:]}. {more}", 79),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_path_and_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="an EAS adapter, or a merged model")
    parser.add_argument("--base", help="an adapter's base, if not the one that its config names")
    _add_num_labels(parser)


def _add_num_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-labels", type=int, help="classes of an adapter's new head, if not as many as the base's"
    )
