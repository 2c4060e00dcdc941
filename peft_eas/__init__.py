"""Efficient Attention Skipping (arXiv 2403.15226) as a method of PEFT. Importing this package registers it."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .architectures import ARCHITECTURES, Architecture
from .callback import EASCallback
from .config import PEFT_TYPE, EASConfig
from .model import EASModel
from .peft_type import add_to_cards
from .recovery.fit import fit_adapters
from .reporting.card import adapter_card, write_merged_card
from .reporting.summary import eas_summary
from .runtime.adapter import InputAdapter, PropagationAdapter
from .runtime.checkpoint import AFTER_SAVE
from .search.loop import EASSearch
from .search.savings import count_kv_bytes, measure_time
from .search.similarity import attention_similarities
from .skippable import Skippable
from .strategies import AttentionBandit, Strategy, ThompsonSampling
from .version import __version__

if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:  # harmless when the package is imported again
    register_peft_method(name="eas", config_cls=EASConfig, model_cls=EASModel)
    add_to_cards(PEFT_TYPE, adapter_card)
    AFTER_SAVE.append(write_merged_card)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AttentionBandit",
    "EASCallback",
    "EASConfig",
    "EASModel",
    "EASSearch",
    "InputAdapter",
    "PropagationAdapter",
    "Skippable",
    "Strategy",
    "ThompsonSampling",
    "__version__",
    "attention_similarities",
    "count_kv_bytes",
    "eas_summary",
    "fit_adapters",
    "measure_time",
]
