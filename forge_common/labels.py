"""How a window of tokens says which of its labels are scored. Imports nothing: data and model share it."""

from typing import Any

CONTEXT = -101  # a token t that is read but not scored is CONTEXT - t in a window; -100 may be padding


def is_scored(labels: Any, ignore_index: int) -> Any:
    """Which labels (an array or tensor of tokens of windows) are scored: not padding (`ignore_index`), and not context."""
    return (labels >= 0) & (labels != ignore_index)
