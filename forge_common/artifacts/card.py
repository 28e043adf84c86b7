"""The model card: a README.md with an artifact's metadata as a table."""

import json
from typing import Any

import yaml

OMITTED = ("shapes", "tensor_digests")  # one entry for each tensor: too long for a table


def model_card(title: str, metadata: dict[str, Any]) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads."""
    front_matter: dict[str, Any] = {"tags": ["forge"]}
    if metadata.get("licence"):
        front_matter["license"] = metadata["licence"]
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in metadata.items() if name not in OMITTED)
    header = yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n# {title}\n\n| fact | value |\n| --- | --- |\n{rows}\n"


def _cell(value: Any) -> str:
    """A value as JSON, on one line; an escaped | does not end the cell."""
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")
