"""Adds EAS to PEFT's closed list of methods. Every workaround for PEFT lives here, and only here."""

from peft.utils import PeftType


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
