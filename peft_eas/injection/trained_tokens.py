"""Tokens that are trained beside the adapters (`trainable_token_indices`): rows of embeddings, in PEFT's wrapper."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from ..config import EASConfig

_WITH_ROWS = (nn.Embedding, nn.Linear)  # what PEFT's wrapper computes


def check_trained_tokens(config: EASConfig, model: nn.Module) -> None:
    """Checks `trainable_token_indices` against the model, which PEFT does when it has changed it already.

    An output layer that is tied to an embedding is trained with its rows, so that `modules_to_save` cannot train it
    whole; TRL puts it there for every model whose chat template adds tokens. It is taken out, with a warning.

    Raises:
        ValueError: for a name that is no embedding's, for ids out of range, and for a layer that `modules_to_save`, or
            another adapter, trains whole.
    """
    config.check_token_indices()
    # A tied module may have several names, of which the config may give any.
    modules = dict(model.named_modules(remove_duplicate=False))
    saved = {given: _ending_in(given, modules) for given in config.modules_to_save or ()}
    for given, names in saved.items():
        _refuse([name for name in names if isinstance(modules[name], TrainableTokensWrapper)], f"{given!r} whole")
    trained = {}
    for given, indices in _by_layer(config, model, modules).items():
        names = [name for name in _ending_in(given, modules) if isinstance(_base(modules[name]), _WITH_ROWS)]
        if not names:
            known = [name for name, module in modules.items() if isinstance(_base(module), nn.Embedding)]
            raise ValueError(
                f"trainable_token_indices={config.trainable_token_indices!r}: {given!r} is no embedding of "
                f"{type(model).__name__}. Name one of these, or their endings: {', '.join(known) or 'none'}."
            )
        _refuse([name for name in names if isinstance(modules[name], ModulesToSaveWrapper)], f"tokens of {given!r}")
        rows = min(_base(modules[name]).weight.shape[0] for name in names)
        if max(indices, default=0) >= rows:
            raise ValueError(
                f"trainable_token_indices names token {max(indices)}, but {names[0]} has {rows} rows. Give ids from 0 "
                f"to {rows - 1}, or call resize_token_embeddings(len(tokenizer)) on the base model first."
            )
        trained |= {name: modules[name] for name in names}
    both = [given for given, names in saved.items() if set(names) & set(trained)]
    if both:
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} trains {both[0]!r} whole, and trainable_token_indices tokens "
            "of it. Name it in one of them."
        )
    weights = {id(_base(module).weight) for module in trained.values()}
    biased = [name for name, one in modules.items() if _is_one_of(weights, one) and _bias(one) is not None]
    if biased:
        raise ValueError(
            f"trainable_token_indices={config.trainable_token_indices!r} would train tokens of {biased[0]}, whose "
            "bias PEFT leaves out there. Train the embedding, and this layer if it is tied to it, whole: name them in "
            "modules_to_save."
        )
    tied = [given for given, names in saved.items() if any(_is_one_of(weights, modules[name]) for name in names)]
    if tied:
        warnings.warn(
            f"modules_to_save names {', '.join(tied)}, which is tied to {', '.join(trained)} and so trained with its "
            "tokens. It is taken out of modules_to_save. To train it whole, untie the weights, or name both layers in "
            "modules_to_save and no trainable_token_indices.",
            stacklevel=2,
        )
        config.modules_to_save = [given for given in config.modules_to_save if given not in tied] or None


def _by_layer(config: EASConfig, model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    given = config.trainable_token_indices
    if given is None or isinstance(given, dict):
        return given or {}
    with suppress(NotImplementedError, AttributeError):
        embedding = model.get_input_embeddings()
        return {next(name for name, module in modules.items() if module is embedding): given}
    raise ValueError(
        f"trainable_token_indices={given!r} is a list, but {type(model).__name__} does not tell which is its input "
        "embedding. Give a dict from its name to the list."
    )


def _ending_in(given: str, modules: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that PEFT finds by `given`."""
    return [name for name in modules if name.endswith(given)]


def _base(module: nn.Module) -> nn.Module:
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module


def _bias(module: nn.Module) -> nn.Parameter | None:
    return getattr(_base(module), "bias", None)


def _is_one_of(weights: set[int], module: nn.Module) -> bool:
    return id(getattr(_base(module), "weight", None)) in weights


def _refuse(names: list[str], what: str) -> None:
    if names:
        raise ValueError(
            f"The adapter is to train {what}, but another adapter of this model trains {names[0]} in the other way: "
            "one trains the whole layer (modules_to_save), one its tokens (trainable_token_indices). Train it in the "
            "same way in both."
        )


def complete_wrappers(model: nn.Module) -> None:
    """Gives PEFT's wrappers what is read of an output layer besides its weight, as TRL's fused one does."""
    for _, wrapper in _wrappers(model):
        wrapper.bias = None


@torch.no_grad()
def copy_tokens(model: nn.Module, source: str, target: str) -> None:
    """Lets the tokens of the adapter `target` be as those of `source`."""
    for _, wrapper in _wrappers(model):
        rows = wrapper.token_adapter.trainable_tokens_delta
        if source in rows and target in rows:
            rows[target].copy_(rows[source])


def _wrappers(model: nn.Module) -> Iterator[tuple[str, TrainableTokensWrapper]]:
    modules = list(model.named_modules(remove_duplicate=False))
    return ((name, one) for name, one in modules if isinstance(one, TrainableTokensWrapper))


def _own(wrapper: TrainableTokensWrapper, adapter_names: Iterable[str]) -> list[str]:
    """Those of the adapters that train tokens here."""
    return [name for name in adapter_names if name in wrapper.token_adapter.trainable_tokens_delta]


def check_tokens(model: nn.Module, adapter_names: list[str], finite: bool) -> None:
    """Raises a ValueError if adapters to be merged train the same token, or with `finite` if one holds a NaN."""
    for name, wrapper in _wrappers(model):
        tokens, own = wrapper.token_adapter, _own(wrapper, adapter_names)
        indices = [index for one in own for index in tokens.token_indices[one]]
        if len(set(indices)) < len(indices):
            raise ValueError(
                f"The adapters {', '.join(map(repr, own))} train the same tokens of {name}, for which one row can "
                "stay. Nothing was changed. Merge one of them."
            )
        if finite and not all(bool(torch.isfinite(tokens.trainable_tokens_delta[one]).all()) for one in own):
            raise ValueError(
                f"The tokens of {name} that {', '.join(own)} has trained hold NaN or infinity. Nothing was changed. "
                "Train again with a lower learning rate, or load an earlier checkpoint."
            )


def merge_tokens(model: nn.Module, adapter_names: list[str]) -> None:
    """Writes the tokens of those of the adapters that train any into the embeddings, in place, unless they are there.

    PEFT's own merge fails on an adapter that trains none while another does.
    """
    for _, wrapper in _wrappers(model):
        tokens = wrapper.token_adapter
        names = [name for name in _own(wrapper, adapter_names) if name not in tokens.merged_adapters]
        if names:
            with onload_layer(tokens):
                tokens.merge(adapter_names=names)


def unload_tokens(model: nn.Module, adapter_names: list[str]) -> None:
    """Takes the wrappers off, and leaves the tokens of the adapters in the embeddings, or without any the base's."""
    merge_tokens(model, adapter_names)
    for name, wrapper in _wrappers(model):
        tokens = wrapper.token_adapter
        if tokens.merged and not adapter_names:
            with onload_layer(tokens):
                tokens.unmerge()
        model.set_submodule(name, tokens.get_base_layer())
