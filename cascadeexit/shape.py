"""Shape: how many layers a model has and where its exits are, known before its weights are loaded."""

from dataclasses import dataclass
from typing import Self

from cascadeexit.engine import Engine


@dataclass(frozen=True)
class Shape:
    """What a page must know of a model before it is loaded."""

    name: str
    num_layers: int
    exit_layers: tuple[int, ...]        # layers below each exit, ascending; 0: the exit stands before the first layer
    trained: bool                       # False: the exits are untrained and only show that the machinery works

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Shape of a loaded model."""
        return cls(engine.model.name, engine.model.num_layers, engine.model.exit_layers, engine.bank.config.trained)

    @property
    def num_exits(self) -> int:
        return len(self.exit_layers)

    @property
    def depths(self) -> list[float]:
        """Share of the layers below each exit."""
        return [layer / self.num_layers for layer in self.exit_layers]


def exit_name(s: int, shape: Shape) -> str:
    """Name of segment s in plain words, such as "Exit 2 (after layer 9 of 30)"; the last segment is "Full model"."""
    if s == shape.num_exits:
        return "Full model"
    if shape.exit_layers[s] == 0:
        return f"Exit {s + 1} (before the {shape.num_layers} layers)"
    return f"Exit {s + 1} (after layer {shape.exit_layers[s]} of {shape.num_layers})"
