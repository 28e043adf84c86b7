"""The names of the routers and their numbers.

Imports nothing heavy: an unknown name is reported before torch is loaded.
"""

from dataclasses import dataclass

CALIBRATED = {  # router -> which of its numbers (Tuning) `assemble --calibrate` fits
    "context": ("temperature", "trunk_share"),
    "learned": ("trunk_share",),
    "ridge": ("sharpness", "trunk_share"),
    "uniform": ("trunk_share",),
}
ROUTERS = tuple(CALIBRATED)


@dataclass(frozen=True)
class Tuning:
    """The hyperparameters of the routers (docs/RESULTS.md has the measurements).

    ValueError where the gates would not be finite.
    """

    temperature: float = 0.35  # weight of a token's evidence
    switch: float = 0.01  # probability that the domain changes at a token
    unknown: float = 0.3  # prior of a domain that no candidate knows
    repeats: float = 0.3  # weight of the document's own tokens so far in a candidate's likelihood
    own: float = 1.0  # weight, in the output weights, of the log probabilities that each head gave the tokens so far
    trunk_share: float = 1.0  # weight of the trunk in the prior, where each module has 1
    sharpness: float = 10.0  # of ridge: softmax(sharpness * regression)

    def __post_init__(self):
        bounds = {"switch": (0, 1), "unknown": (0, 0.99), "repeats": (0, 0.99), "trunk_share": (1e-9, 1e9)}
        for name, value in vars(self).items():
            low, high = bounds.get(name, (0, 1e9))
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie in [{low}, {high}]")
