"""Adds EAS to PEFT's closed list of methods. Every workaround for PEFT lives here, and only here."""

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from torch import nn


def add_peft_type(name: str = "EAS") -> PeftType:
    """Adds the member `name` to `PeftType`, once; returns the member.

    `PeftType` is a closed str-Enum and PEFT has no hook for plug-ins, so the member enters the enum's own tables.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python ≥ 3.13 looks here for `"EAS" in PeftType`
        PeftType._hashable_values_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


class AdapterDict(nn.ModuleDict):
    """Adapters of one layer by adapter name, for adapters that have submodules of their own.

    PEFT before 0.21 takes an adapter's name out of a state dict's keys only at their end or one before it, where ours,
    `eas_pia.<adapter>.up.0.weight`, do not have it, and offers no override. There, and only there, the state dict
    shows the name one before the end. What PEFT then loads has it in its natural place again.
    """

    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.register_state_dict_post_hook(_move_names_to_end)
            self.register_load_state_dict_pre_hook(_move_names_to_front)


def _move_names_to_end(
    module: AdapterDict, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: dict
) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name, _, path = key.removeprefix(prefix).partition(".")
        *parents, last = path.split(".")
        # A buffer of the adapter itself has no parents: there the name goes to the very end.
        parts = [*parents, name, last] if parents else [last, name]
        state_dict[prefix + ".".join(parts)] = state_dict.pop(key)


def _move_names_to_front(module: AdapterDict, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        parts = key.removeprefix(prefix).split(".")
        for position in (-1, -2):
            if len(parts) > 1 and parts[0] not in module and parts[position] in module:
                parts.insert(0, parts.pop(position))
        state_dict[prefix + ".".join(parts)] = state_dict.pop(key)
