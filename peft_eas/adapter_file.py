"""The weights file of an adapter: whether it is whole, and an EAS adapter's."""

import os
from pickle import UnpicklingError

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

# With which PEFT starts the name of each weight.
KEY_PREFIX = "base_model.model."


def check_weights_file(folder: str) -> None:
    """Checks the file that PEFT would read from `folder`, if there is one.

    Raises:
        ValueError: if it is truncated, or holds no EAS adapter.
    """
    paths = (os.path.join(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        return
    kind = "safetensors" if path.endswith(SAFETENSORS_WEIGHTS_NAME) else "PyTorch"
    try:
        # By key, whether the numbers are of a floating-point type.
        if kind == "safetensors":
            with safe_open(path, framework="pt") as file:
                floats = {key: file.get_slice(key).get_dtype().startswith(("F", "BF")) for key in file.keys()}  # noqa: SIM118
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            floats = {
                key: isinstance(value, torch.Tensor) and value.is_floating_point() for key, value in weights.items()
            }
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is truncated or not a {kind} file. Copy or download the adapter "
            "again."
        ) from error
    advice = "Load it with the method that wrote it, or put the EAS adapter's own file in its place."
    own = [key for key in floats if ".eas_" in key]
    if not own:
        found = ", ".join(list(floats)[:3]) or "no tensor at all"
        raise ValueError(f"{path} holds no EAS adapter (no key with '.eas_'; it holds {found}). {advice}")
    strange = [key for key in own if not key.startswith(KEY_PREFIX)]
    if strange:
        raise ValueError(
            f"{path} holds EAS weights under names that do not start with {KEY_PREFIX!r}, such as {strange[0]}, so "
            f"that PEFT would leave them out. {advice}"
        )
    strange = [key for key in own if not floats[key] and not key.endswith("num_contexts")]
    if strange:
        raise ValueError(f"{path} holds {strange[0]}, which is a weight, but no floating-point tensor. {advice}")
