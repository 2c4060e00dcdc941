"""What the Hub asks of a model card's front matter, so far as it is checked here."""

import re
from typing import Any

import yaml

# What the Hub's own error lists behind '"license" must be one of'.
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other""".split()  # noqa: SIM905
PIPELINE_TAGS = """text-generation image-text-to-text text-classification token-classification question-answering
    fill-mask feature-extraction image-feature-extraction image-classification zero-shot-image-classification
    image-to-text automatic-speech-recognition audio-classification visual-question-answering""".split()  # noqa: SIM905
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MODEL_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", re.ASCII)


def metadata_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a model card's metadata, as the Hub has them for the fields that are checked here."""
    match = FRONT_MATTER.match(content)
    if match is None or not match[1].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not isinstance(data, dict):
        return ["YAML Metadata Error: metadata must be an object"], []
    errors, warnings = [], []

    def listed(name: str) -> list[Any]:
        value = data.get(name)
        return [] if value is None else value if isinstance(value, list) else [value]

    for name in ("license", "base_model", "tags", "language", "library_name", "pipeline_tag"):
        if any(not isinstance(value, str) or not value for value in listed(name)):
            errors.append(f'"{name}" must be a string')
    for name in ("library_name", "pipeline_tag", "base_model_relation"):
        if isinstance(data.get(name), list):
            errors.append(f'"{name}" must be a string')
    if "tags" in data and not isinstance(data["tags"], list):
        errors.append('"tags" must be an array')
    errors += [f'"license" must be one of {LICENSES}' for value in listed("license") if value not in LICENSES]
    if data.get("license") == "other" and not data.get("license_name"):
        warnings.append('"license_name" is expected when "license" is "other"')
    for value in listed("base_model"):
        if not MODEL_ID.fullmatch(str(value)):
            errors.append(f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINE_TAGS:
        warnings.append(f'The pipeline tag "{data["pipeline_tag"]}" is not in the official list')
    return errors, warnings
