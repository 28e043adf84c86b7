"""The model card: a README.md with an artifact's metadata as a table."""

import json
from typing import Any

OMITTED = ("shapes", "tensor_digests")  # one entry for each tensor: too long for a table


def model_card(title: str, metadata: dict[str, Any]) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads."""
    rows = "\n".join(
        f"| {name} | {json.dumps(value, ensure_ascii=False)} |"
        for name, value in metadata.items()
        if name not in OMITTED
    )
    licence = f"license: {metadata['licence']}\n" if metadata.get("licence") else ""
    return f"---\ntags: [forge]\n{licence}---\n\n# {title}\n\n| fact | value |\n| --- | --- |\n{rows}\n"
