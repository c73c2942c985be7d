"""Shape: how many layers a model has and where its exits are. This is known before its weights are loaded."""

from dataclasses import dataclass
from typing import Self

from cascadeexit.engine import Engine


@dataclass(frozen=True)
class Shape:
    """Name, number of layers and exits of a model. All of this is known before the model is loaded."""

    name: str
    num_layers: int
    exit_layers: tuple[int, ...]        # layers below each exit, ascending; 0: the exit is before the first layer
    trained: bool                       # False: exits with random or initial weights

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Return the shape of a loaded model."""
        return cls(engine.model.name, engine.model.num_layers, engine.model.exit_layers, engine.bank.config.trained)

    @property
    def num_exits(self) -> int:
        return len(self.exit_layers)

    @property
    def depths(self) -> list[float]:
        """Depth of each exit: the share of the layers below it, in [0, 1)."""
        return [layer / self.num_layers for layer in self.exit_layers]


def exit_name(s: int, shape: Shape) -> str:
    """Return the page's name for exit s, counted from 0: for s = 1, for example, "Exit 2 (after layer 9 of 30)".

    If s is the number of exits, the name is "Full model".
    """
    if s == shape.num_exits:
        return "Full model"
    layer = shape.exit_layers[s]
    place = f"after layer {layer}" if layer else "before layer 1"
    return f"Exit {s + 1} ({place} of {shape.num_layers})"
