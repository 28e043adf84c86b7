"""The names of the routers and their numbers. Imports nothing heavy: an unknown name is reported before torch is loaded."""

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
    """The hyperparameters of the routers (docs/RESULTS.md has the measurements). ValueError where the gates would not be finite."""

    temperature: float = 0.2  # weight of a token's evidence
    switch: float = 0.02  # probability that the domain changes at a token
    own: float = 1.0  # weight, in the output weights, of the log probabilities that each head gave the tokens so far
    trunk_share: float = 1.0  # weight of the trunk in the prior, where each module has 1
    sharpness: float = 10.0  # of ridge: softmax(sharpness * regression)

    def __post_init__(self):
        bounds = {"switch": (0, 1), "trunk_share": (1e-9, 1e9)}
        for name, value in vars(self).items():
            low, high = bounds.get(name, (0, 1e9))
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie in [{low}, {high}]")
