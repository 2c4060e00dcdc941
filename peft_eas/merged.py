"""Public names of merged models; they live in `runtime.merged`."""

from .runtime.merged import merged_config_class, merged_model_class, register_family

__all__ = ["merged_config_class", "merged_model_class", "register_family"]
