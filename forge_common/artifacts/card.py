"""The model card: a README.md with front matter for the Hugging Face hub, how to use the artifact, and its metadata as
a table.
"""

import json
import re
from typing import Any

import yaml

from ..files.places import split_weight

OMITTED = ("shapes", "tensor_digests", "command")  # too long for a table
HERE = "ORG/NAME"  # stands for the artifact's own id; an upload replaces it
# The identifiers that the hub accepts as a licence. Another licence is `other` there, with its name.
LICENCES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m openrail++ afl-3.0 artistic-2.0
bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma"""


def model_card(title: str, metadata: dict[str, Any]) -> str:
    """The text of README.md. The metadata may be untrusted: values of an unexpected form are only in the table."""
    front_matter = yaml.safe_dump(_front_matter(metadata), sort_keys=False, allow_unicode=True)
    sections = [f"# {title}", _use(metadata), _losses(metadata.get("losses"))]
    if metadata.get("command"):
        # A block by indentation: nothing in the command can end it.
        sections.append(f"## Training\n\n    {metadata['command']}")
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in metadata.items() if name not in OMITTED)
    sections.append(f"## Metadata\n\n| fact | value |\n| --- | --- |\n{rows}")
    return f"---\n{front_matter}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(metadata: dict[str, Any]) -> dict[str, Any]:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards, "Model card metadata"."""
    content: dict[str, Any] = {"library_name": _library(metadata), "pipeline_tag": "text-generation", "tags": ["forge"]}
    parts = metadata.get("digests", {})
    licences = {metadata.get("licence")}
    if parts:
        licences = {metadata.get("licences", {}).get(name) for name in parts}
    licence = licences.pop() if len(licences) == 1 else None  # the card states none where those of the parts differ
    if licence:
        identifier = licence.strip().lower()
        content["license"] = identifier if identifier in LICENCES.split() else "other"
        if identifier not in LICENCES.split():
            content["license_name"] = re.sub(r"[^a-z0-9.]+", "-", identifier).strip("-.") or "unnamed"
    bases = [place.partition("@")[0] for place in metadata.get("origins", {}).values()]
    if bases:
        content["base_model"] = sorted(set(bases))
        content["base_model_relation"] = "finetune"
        if parts or "merged_from" in metadata:
            content["base_model_relation"] = "merge"
        elif "trunk_digest" in metadata:
            content["base_model_relation"] = "adapter"
    sources = [split_weight(source)[0] for source in metadata.get("sources", ())]
    matches = [re.fullmatch(r"hf:(\w[\w.-]*(?:/[\w.-]+)?)(?::.*)?", source) for source in sources]
    datasets = {match[1] for match in matches if match}
    if datasets:
        content["datasets"] = sorted(datasets)
    return content


def _library(metadata: dict[str, Any]) -> str:
    if metadata.get("exported_as") in ("gguf", "peft"):
        return metadata["exported_as"]
    return "forge" if "modules" in metadata or "trunk_digest" in metadata else "transformers"


def _use(metadata: dict[str, Any]) -> str:
    """What the artifact is and how to use it."""
    trunk = metadata.get("origins", {}).get("trunk", "TRUNK")
    exported = metadata.get("exported_as")
    command = "python -m forge_common."
    if exported == "gguf":
        return "`model.gguf` is a model in float32, for llama.cpp and others."
    if exported == "peft":
        text = "A LoRA adapter of a module, for PEFT, on its trunk in Transformers:"
        lines = [f'PeftModel.from_pretrained(trunk, "{HERE}")']
    elif exported == "transformers" and "router" in metadata:
        text = "A trunk and modules that were trained apart, assembled into one model with its own code:"
        lines = [f'AutoModelForCausalLM.from_pretrained("{HERE}", trust_remote_code=True)']
    elif "modules" in metadata:
        text = (
            "A trunk and modules that were trained apart, assembled into one model, which routes each token by itself:"
        )
        lines = [f"{command}generate --model {HERE} --prompt TEXT"]
    elif "trunk_digest" in metadata:
        text = (
            "A module: what was trained for one domain on a frozen trunk, whose digest is "
            f"`{metadata['trunk_digest']}`. It works with that trunk alone, or assembled with other modules of it:"
        )
        lines = [
            f"{command}generate --model {trunk} --module {HERE} --prompt TEXT",
            f"{command}assemble --trunk {trunk} --modules {HERE} OTHER-MODULE --output-dir runs/assembled",
        ]
    else:
        text = "A Transformers checkpoint, on which modules can be trained:"
        lines = [f"accelerate launch train_module.py --trunk {HERE} --name NAME --data SOURCE --output-dir runs/NAME"]
    return text + "\n\n```\n" + "\n".join(lines) + "\n```"


def _losses(losses: Any) -> str:
    """The held-out losses of a module's domains, as publish_module writes them."""
    if not isinstance(losses, dict) or not losses:
        return ""
    keys = ("tokens", "before", "after")
    rows = [
        f"| {_cell(domain)} | {row['tokens']:,} | {row['before']:.4f} | {row['after']:.4f} |"
        for domain, row in losses.items()
        if isinstance(row, dict) and all(type(row.get(key)) in (int, float) for key in keys)
    ]
    header = "| held-out text | tokens | trunk | with the module |\n| --- | --- | --- | --- |\n"
    return "## Losses\n\nNats per token.\n\n" + header + "\n".join(rows) if rows else ""


def _cell(value: Any) -> str:
    """A value as JSON, on one line; an escaped | does not end the cell."""
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")
