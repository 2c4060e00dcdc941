"""Adds EAS to PEFT's closed list of methods and to its cards. Every workaround for PEFT lives here, and only here."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
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


def add_to_cards(
    peft_type: PeftType, around: Callable[[PeftModel, str | os.PathLike], AbstractContextManager]
) -> None:
    """Lets PEFT write its model card of models of the method `peft_type` inside the context `around`, also on a push.

    PEFT has no hook for a method's own card. And push_to_hub (`transformers.utils.PushToHubMixin`) puts the card that
    is on the Hub, or an empty one that calls the adapter a transformers model, in the place of the one just saved.
    Calling this again changes nothing.
    """
    write_card, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
    if getattr(write_card, "has_eas", False):
        return

    def is_ours(model: PeftModel) -> bool:
        return model.active_peft_config.peft_type == peft_type

    @functools.wraps(write_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if not is_ours(self):
            return write_card(self, output_dir)
        with around(self, output_dir):
            return write_card(self, output_dir)

    @functools.wraps(upload)
    def upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if is_ours(self):
            self.create_or_update_model_card(working_dir)
        return upload(self, working_dir, *args, **kwargs)

    create_or_update_model_card.has_eas = True
    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = upload_modified_files
