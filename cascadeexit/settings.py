"""Settings: what a visitor chose on the page, with defaults, limits, address parameters and decoding configs.

A setting has three names: the field has the name of its control on the page, `query` is its parameter in the page's
address, and `record` is its key in a recorded run. Thresholds have one control for each exit (`THRESHOLDS`) and share
one parameter of the address.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Self

from cascadeexit.config import CASCADE_THRESHOLD, DecodeConfig, Mode, graded_thresholds
from cascadeexit.prompts import MAX_PROMPT_CHARACTERS
from cascadeexit.shape import Shape
from cascadeexit.sides import CASCADE, FULL, SECOND, Side

DISABLED = 1.0              # threshold at the end of a slider: the exit is never taken
MAX_EXITS = 6               # threshold sliders on the page
THRESHOLDS = tuple(f"threshold_{s + 1}" for s in range(MAX_EXITS))
FIRST_CONFIDENT = -1        # exit choice: the first exit whose confidence reaches its threshold


class Limits(NamedTuple):
    """Smallest and largest value of a slider, and its step."""

    low: float
    high: float
    step: float


def _setting(default, query: str, record: str | None, limits: Limits | None = None):
    """Field of `Settings` with its other names and its limits."""
    return field(default=default, metadata=dict(query=query, record=record, limits=limits))


@dataclass(frozen=True)
class Settings:
    """How one run of the page is decoded. A control that a visitor emptied is None; `decode_configs` refuses it."""

    model: str = _setting("", "model", None)
    prompt: str = _setting("", "p", "prompt")
    mode: str = _setting(Mode.CASCADE, "mode", "mode")
    chat: bool = _setting(True, "chat", "chat")
    max_new_tokens: int = _setting(200, "n", "tokens", Limits(1, 1024, 1))
    max_draft: int = _setting(DecodeConfig.max_draft, "drafts", "drafts", Limits(1, 15, 1))
    tolerance: float = _setting(0.0, "tol", "tolerance", Limits(0, 0.9, 0.05))
    temperature: float = _setting(0.0, "temp", "temperature", Limits(0, 2, 0.05))
    top_p: float = _setting(1.0, "top_p", "top_p", Limits(0.05, 1, 0.05))
    seed: int = _setting(0, "seed", "seed")
    exit_choice: int = _setting(FIRST_CONFIDENT, "exit", "force")
    """`FIRST_CONFIDENT`, an exit that writes every token, or an exit that is disabled (`disabling`)."""
    thresholds: tuple[float, ...] = _setting((), "t", "thresholds", Limits(0, DISABLED, 0.01))
    """One for each exit. Values beyond the model's number of exits are ignored."""
    beside: str = _setting("", "beside", "beside")
    """What a third panel shows: one of `beside_choices`; "" for no third panel."""

    @classmethod
    def from_controls(cls, values: Mapping[str, object]) -> Self:
        """Settings from the value of each control, by name."""
        single = {name: value for name, value in values.items() if name not in THRESHOLDS}
        return cls(**single, thresholds=tuple(values[name] for name in THRESHOLDS if name in values))

    def decode_configs(self, num_exits: int) -> tuple[DecodeConfig, DecodeConfig]:
        """Configs of the run with exits and of the full model's run.

        Raises ValueError with a message for the visitor.
        """
        try:
            shared = dict(max_new_tokens=int(self.max_new_tokens), temperature=self.temperature, top_p=self.top_p,
                          seed=int(self.seed or 0) % 2**63)
            return (DecodeConfig(mode=self.mode, max_draft=int(self.max_draft), thresholds=self._thresholds(num_exits),
                                 tolerance=self.tolerance if self.mode == Mode.VERIFIED else 0, **shared),
                    DecodeConfig(mode=Mode.FULL, **shared))
        except TypeError:
            raise ValueError("A setting is empty: give it a value.") from None
        except OverflowError:
            raise ValueError("A setting is too large: give it a smaller value.") from None

    def sides(self, shape: Shape) -> list[Side]:
        """Sides of a run, in the order of the panels: these settings, what is beside them, and the full model.

        Raises ValueError with a message for the visitor.
        """
        config, full = self.decode_configs(shape.num_exits)
        sides = [Side(CASCADE, self._title(shape), _checked_late(config))]
        if self.beside:
            other = self._beside(shape)
            sides.append(Side(SECOND, other._title(shape), _checked_late(other.decode_configs(shape.num_exits)[0])))
        return [*sides, Side(FULL, "Full model", full)]

    def _beside(self, shape: Shape) -> Self:
        """These settings, changed to what the third panel shows."""
        choices = beside_choices(shape)
        if self.beside not in choices:
            raise ValueError(f"'{self.beside}' cannot be shown beside the full model; choose one of "
                             f"{', '.join(choices[1:])}.")
        if self.beside == EXACT:
            return replace(self, mode=Mode.VERIFIED, exit_choice=FIRST_CONFIDENT, tolerance=0.0)
        if self.beside in PRESETS:
            return replace(self, mode=Mode.CASCADE, exit_choice=FIRST_CONFIDENT,
                           thresholds=tuple(thresholds_at(PRESETS[self.beside], shape)))
        return replace(self, mode=Mode.CASCADE, exit_choice=exit_choices(shape)[self.beside])

    def _title(self, shape: Shape) -> str:
        """Title of the panel that is decoded with these settings."""
        choice = next((words for words, value in exit_choices(shape).items() if value == self.exit_choice >= 0), None)
        if self.mode == Mode.VERIFIED:
            return "Exact: same text, checked" if not self.tolerance else f"Checked, tolerance {self.tolerance:g}"
        if choice:
            return choice
        first = first_threshold(self.thresholds, shape) if self.exit_choice == FIRST_CONFIDENT else None
        return next((name for name, threshold in PRESETS.items() if threshold == first), "Own thresholds")

    def _thresholds(self, num_exits: int) -> list[float | None] | None:
        """Return one threshold for each exit, None where it is disabled. None for all of them: the mode's default."""
        if self.exit_choice >= 0:
            return [0.0 if s == self.exit_choice else None for s in range(num_exits)]
        if self.exit_choice == FIRST_CONFIDENT and self.mode == Mode.VERIFIED:
            return None         # thresholds never change a verified text: the engine drafts where it saves time
        wanted = [None if t >= DISABLED else t for t in self.thresholds[:num_exits]]
        return [None if self.exit_choice == disabling(s) else t for s, t in enumerate(wanted)]

    def record(self) -> dict:
        """These settings as a recorded run keeps them."""
        return {f.metadata["record"]: getattr(self, f.name) for f in fields(self) if f.metadata["record"]}


def limits(name: str) -> Limits:
    """Limits of the setting with this name."""
    return _FIELDS[name].metadata["limits"]


def query_name(control: str) -> str:
    """Parameter of the page's address that holds the value of this control."""
    return _FIELDS["thresholds" if control in THRESHOLDS else control].metadata["query"]


def from_query(query: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, object]:
    """Values for controls, by name, from the page's address; a parameter that does not fit is left out.

    Args:
        shapes: of each model on the menu; the first is the default.
    """
    label = query.get("model") if query.get("model") in shapes else next(iter(shapes))
    menus = dict(model=shapes, mode=(Mode.CASCADE, Mode.VERIFIED), exit_choice=exit_choices(shapes[label]).values(),
                 beside=beside_choices(shapes[label]))
    menus = {name: {str(value): value for value in values} for name, values in menus.items()}
    found = {}
    for name, text in _query_texts(query).items():
        if name in menus:
            if text in menus[name]:
                found[name] = menus[name][text]
        elif isinstance(_default(name), str):
            found[name] = text[:MAX_PROMPT_CHARACTERS]
        elif isinstance(_default(name), bool):
            found[name] = text == "true"
        elif (number := _number(text, limits("thresholds" if name in THRESHOLDS else name))) is not None:
            found[name] = number
    return found


def _query_texts(query: Mapping[str, str]) -> dict[str, str]:
    """Text for each control that the address names; all thresholds are one parameter, separated by commas."""
    texts = {f.name: query[f.metadata["query"]] for f in fields(Settings) if f.metadata["query"] in query}
    return texts | dict(zip(THRESHOLDS, texts.pop("thresholds", "").split(",")))


def _default(control: str):
    """Default value of a control's setting, by whose type its text is read."""
    return _FIELDS["thresholds" if control in THRESHOLDS else control].default


def _number(text: str, limits: Limits | None) -> float | int | None:
    """A number within limits, whole where the step is 1 or there are no limits; None when the text is no number."""
    try:
        number = float(text)
        if not math.isfinite(number):
            return None
        if limits is None:
            return int(number)
        number = min(max(number, limits.low), limits.high)
        return int(number) if limits.step == 1 else number
    except ValueError:
        return None


_FIELDS = {f.name: f for f in fields(Settings)}


# -- exits ---------------------------------------------------------------------------------------------------------


def disabling(s: int) -> int:
    """Exit choice that disables exit s."""
    return FIRST_CONFIDENT - 1 - s


def exit_choices(shape: Shape) -> dict[str, int]:
    """The page's menu of exit choices: words and value of each."""
    exits = range(shape.num_exits)
    return {"First confident exit": FIRST_CONFIDENT, **{f"Always exit {s + 1}": s for s in exits},
            **{f"Disable exit {s + 1}": disabling(s) for s in exits}}


def beside_choices(shape: Shape) -> list[str]:
    """What a third panel can show: nothing, a preset, exact text, or the tokens of one exit."""
    return ["", *PRESETS, EXACT, *(words for words, value in exit_choices(shape).items() if value >= 0)]


def _checked_late(config: DecodeConfig) -> DecodeConfig:
    """Let a cascade run report the full model's choices while the text grows: the page shows them."""
    return replace(config, check_late=True) if config.mode is Mode.CASCADE else config


def thresholds_at(first: float, shape: Shape) -> list[float]:
    """Value of each threshold slider, from the threshold of the first exit (`graded_thresholds`).

    Returns MAX_EXITS values; `DISABLED` disables all exits.
    """
    # Rounded up, never to the nearest: a lower threshold would not be covered by the calibration.
    each = [t if t >= DISABLED else min(math.ceil(round(100 * t, 6)) / 100, 0.99)
            for t in graded_thresholds(first, shape.depths)]
    return [*each, *[first] * MAX_EXITS][:MAX_EXITS]


def first_threshold(thresholds: Sequence[float], shape: Shape) -> float | None:
    """Return the first exit's threshold if all others follow from it as in `thresholds_at`, else None."""
    wanted = list(thresholds)[:shape.num_exits]
    return wanted[0] if wanted and wanted == thresholds_at(wanted[0], shape)[:len(wanted)] else None


PRESETS = {"Fast": 0.4, "Balanced": CASCADE_THRESHOLD, "Careful": 0.8}     # threshold of the first exit
EXACT = "Exact"             # the third panel in verified mode
