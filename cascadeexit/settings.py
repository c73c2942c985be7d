"""Settings: what a visitor chose on the page, with default values and limits.

A setting has three names: the name of its field, which is also the name of its control on the page; `query`, the name
of its parameter in the page's address; and `record`, its key in a recorded run. Thresholds are special: they have one
control for each exit (`THRESHOLDS`), and share one parameter in the address.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Self

from cascadeexit.config import CASCADE_THRESHOLD, DecodeConfig, Mode, graded_thresholds
from cascadeexit.prompts import MAX_PROMPT_CHARACTERS
from cascadeexit.shape import Shape
from cascadeexit.sides import CASCADE, FULL, SECOND, Side
from cascadeexit.values import as_whole, number, shown, whole

DISABLED = 1.0              # threshold at the end of a slider: the exit is never taken
MAX_EXITS = 6               # threshold sliders on the page
THRESHOLDS = tuple(f"threshold_{s + 1}" for s in range(MAX_EXITS))
LARGEST_WHOLE = 2**53 - 1   # largest whole number in JavaScript
FIRST_CONFIDENT = -1        # exit choice: the first exit whose confidence reaches its threshold


class Limits(NamedTuple):
    """Smallest and largest value of a slider, and its step."""

    low: float
    high: float
    step: float


def _setting(default, query: str, record: str | None, limits: Limits | None = None):
    """Make a field of `Settings`.

    Args:
        query: name of the setting's parameter in the page's address.
        record: key of the setting in a recorded run; None if it is not recorded.
        limits: smallest and largest value, for a number with a slider.
    """
    return field(default=default, metadata=dict(query=query, record=record, limits=limits))


@dataclass(frozen=True)
class Settings:
    """Settings of one run, as a visitor chose them on the page. A field is None if the visitor emptied its control.

    `decode_configs` then raises ValueError, except for an empty `seed`, which counts as 0. `model` is a name on the
    menu of models, and `chat` says if the prompt is put into the chat template. `DecodeConfig` explains the fields that
    it also has.
    """

    model: str = _setting("", "model", "model")
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
    """Which exits write tokens. `FIRST_CONFIDENT`: for each token, the first exit that is confident enough. 0 or more:
    always the exit with this index. Less than `FIRST_CONFIDENT`: one exit is disabled (`disabling`)."""
    thresholds: tuple[float, ...] = _setting((), "t", "thresholds", Limits(0, DISABLED, 0.01))
    """Confidence from which an exit is taken, one value for each exit. Values beyond the last exit are ignored."""
    beside: str = _setting("", "beside", "beside")
    """What the third panel shows, one of `beside_choices`. "" means that there is no third panel."""

    @classmethod
    def from_controls(cls, values: Mapping[str, object]) -> Self:
        """Make settings from the values of the controls.

        values: {name of the control: its value}.
        """
        single = {name: value for name, value in values.items() if name not in THRESHOLDS}
        return cls(**single, thresholds=tuple(values[name] for name in THRESHOLDS if name in values))

    def decode_configs(self, num_exits: int) -> tuple[DecodeConfig, DecodeConfig]:
        """Return the config of the run with exits, and the config of the full model's run.

        Raises ValueError with a message for the visitor.
        """
        seed = 0 if self.seed is None else whole("seed", as_whole(self.seed), -2**63, 2**63 - 1)
        tolerance = number("tolerance", self._filled("tolerance"), 0, 1)
        shared = dict(max_new_tokens=as_whole(self._filled("max_new_tokens")), temperature=self._filled("temperature"),
                      top_p=self._filled("top_p"), seed=seed % 2**63)
        return (DecodeConfig(mode=self.mode, max_draft=as_whole(self._filled("max_draft")),
                             thresholds=self._thresholds(num_exits), only_paying=self._choice() < 0,
                             tolerance=tolerance if self.mode == Mode.VERIFIED else 0, **shared),
                DecodeConfig(mode=Mode.FULL, **shared))

    def _filled(self, name: str):
        """Return the field with this name. Raises ValueError with a message for the visitor if it is None."""
        return _given(name, getattr(self, name))

    def _choice(self) -> int:
        return whole("exit_choice", as_whole(self._filled("exit_choice")), disabling(MAX_EXITS), MAX_EXITS)

    def sides(self, shape: Shape) -> list[Side]:
        """Return a `Side` for each text that the page shows in a run, in the order of the panels.

        There are two or three texts: the text that is decoded with these settings, the text of the third panel if there
        is one, and the full model's text. Raises ValueError with a message for the visitor.
        """
        config, full = self.decode_configs(shape.num_exits)
        sides = [Side(CASCADE, self._title(shape), _checked_late(config))]
        if self.beside:
            other = self._beside(shape)
            sides.append(Side(SECOND, other._title(shape), _checked_late(other.decode_configs(shape.num_exits)[0])))
        return [*sides, Side(FULL, "Full model", full)]

    def _beside(self, shape: Shape) -> Self:
        """Return the settings of the third panel: a copy of these settings, changed as `beside` says.

        Raises ValueError if the third panel cannot show this.
        """
        choices = beside_choices(shape)
        if self.beside not in choices:
            raise ValueError(f"{shown(self.beside)} cannot be shown beside the full model; choose one of "
                             f"{', '.join(choices[1:])}.")
        if self.beside == EXACT:
            return replace(self, mode=Mode.VERIFIED, exit_choice=FIRST_CONFIDENT, tolerance=0.0)
        if self.beside in PRESETS:
            return replace(self, mode=Mode.CASCADE, exit_choice=FIRST_CONFIDENT,
                           thresholds=tuple(thresholds_at(PRESETS[self.beside], shape)))
        return replace(self, mode=Mode.CASCADE, exit_choice=exit_choices(shape)[self.beside])

    def _title(self, shape: Shape) -> str:
        """Return the title of a panel that shows a text decoded with these settings."""
        choice = next((words for words, value in exit_choices(shape).items() if value == self.exit_choice >= 0), None)
        if self.mode == Mode.VERIFIED:
            return "Exact: same text, checked" if not self.tolerance else f"Checked, tolerance {self.tolerance:g}"
        if choice:
            return choice
        first = first_threshold(self.thresholds, shape) if self.exit_choice == FIRST_CONFIDENT else None
        return next((name for name, threshold in PRESETS.items() if threshold == first), "Custom thresholds")

    def _thresholds(self, num_exits: int) -> list[float | None] | None:
        """Return the threshold of each exit, or None for an exit that is disabled.

        Returns None instead of a list if the run uses the default of its mode.
        """
        choice = self._choice()
        if choice >= 0:
            return [0.0 if s == choice else None for s in range(num_exits)]
        if choice == FIRST_CONFIDENT and self.mode == Mode.VERIFIED:
            return None         # thresholds never change a verified text: the engine drafts where it saves time
        given = [number("each threshold", _given("each threshold", t)) for t in self.thresholds[:num_exits]]
        return [None if t >= DISABLED or choice == disabling(s) else t for s, t in enumerate(given)]

    def record(self) -> dict:
        """Return the settings that a recorded run stores, {key: value}. A key is the `record` name of a setting."""
        return {f.metadata["record"]: getattr(self, f.name) for f in fields(self) if f.metadata["record"]}


def _given(name: str, value):
    """Return the value of a setting. Raises ValueError with a message for the visitor if its control is empty."""
    if value is None:
        raise ValueError(f"A setting is empty: give {name} a value.")
    return value


def limits(name: str) -> Limits | None:
    """Return the limits of the setting with this name; None if it has no limits.

    name: name of a field of `Settings`, for example "top_p".
    """
    return _FIELDS[name].metadata["limits"]


def query_name(control: str) -> str:
    """Return the name of the parameter in the page's address that holds the value of this control."""
    return _FIELDS["thresholds" if control in THRESHOLDS else control].metadata["query"]


def from_query(query: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, object]:
    """Read values of controls from the page's address. Returns {name of the control: value}.

    A parameter whose value does not fit is left out.

    Args:
        query: the parameters of the address, {name: text}.
        shapes: {name of a model on the menu: its shape}. The first model is the default.
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
            if len(text) <= MAX_PROMPT_CHARACTERS:
                found[name] = text
        elif isinstance(_default(name), bool):
            if text in ("true", "false"):
                found[name] = text == "true"
        elif (value := _number(text, limits("thresholds" if name in THRESHOLDS else name))) is not None:
            found[name] = value
    return found


def _query_texts(query: Mapping[str, str]) -> dict[str, str]:
    """Return {name of the control: its text} for all parameters in the page's address that belong to a control.

    All thresholds are one parameter, separated by commas.
    """
    texts = {f.name: query[f.metadata["query"]] for f in fields(Settings) if f.metadata["query"] in query}
    return texts | dict(zip(THRESHOLDS, texts.pop("thresholds", "").split(",")))


def _default(control: str):
    """Return the default value of a control. Its type says how the control's text is read."""
    return _FIELDS["thresholds" if control in THRESHOLDS else control].default


def _number(text: str, limits: Limits | None) -> float | int | None:
    """Convert text to a number within limits. Returns None for any other text, and for a number beyond the limits.

    The result is whole if the step is 1 or if there are no limits. Without limits, the number must be one that a
    browser can hold exactly.
    """
    low, high, step = limits or (-LARGEST_WHOLE, LARGEST_WHOLE, 1)
    try:
        found = float(text)
    except ValueError:
        return None
    if not low <= found <= high:            # NaN, too
        return None
    return int(found) if step == 1 else found


_FIELDS = {f.name: f for f in fields(Settings)}


# -- exits ---------------------------------------------------------------------------------------------------------


def disabling(s: int) -> int:
    """Return the value of `Settings.exit_choice` that disables exit number s, counted from 0."""
    return FIRST_CONFIDENT - 1 - s


def exit_choices(shape: Shape) -> dict[str, int]:
    """Return the page's menu of exit choices: {text of the choice: value of `Settings.exit_choice`}."""
    exits = range(shape.num_exits)
    return {"First confident exit": FIRST_CONFIDENT, **{f"Always exit {s + 1}": s for s in exits},
            **{f"Disable exit {s + 1}": disabling(s) for s in exits}}


def beside_choices(shape: Shape) -> list[str]:
    """Return the menu of the page's third panel, a list of texts.

    The choices are "" (no third panel), the name of each preset, `EXACT`, and for each exit "Always exit 1" and so on.
    """
    return ["", *PRESETS, EXACT, *(words for words, value in exit_choices(shape).items() if value >= 0)]


def _checked_late(config: DecodeConfig) -> DecodeConfig:
    """Return the config with `check_late` switched on if its mode is cascade. Other configs are returned unchanged.

    The page then shows the full model's choices while the text grows.
    """
    return replace(config, check_late=True) if config.mode is Mode.CASCADE else config


def thresholds_at(first: float, shape: Shape) -> list[float]:
    """Compute the value of each threshold slider from the threshold of the first exit (`graded_thresholds`).

    Returns MAX_EXITS values, rounded up to whole hundredths. `first` = `DISABLED` disables all exits.
    """
    # Rounded up, never to the nearest: a lower threshold would not be covered by the calibration.
    each = [t if t >= DISABLED else min(math.ceil(round(100 * t, 6)) / 100, 0.99)
            for t in graded_thresholds(first, shape.depths)]
    return [*each, *[first] * MAX_EXITS][:MAX_EXITS]


def first_threshold(thresholds: Sequence[float], shape: Shape) -> float | None:
    """Return the threshold of the first exit if `thresholds_at` computes all other thresholds from it, else None."""
    wanted = list(thresholds)[:shape.num_exits]
    return wanted[0] if wanted and wanted == thresholds_at(wanted[0], shape)[:len(wanted)] else None


PRESETS = {"Fast": 0.4, "Balanced": CASCADE_THRESHOLD, "Careful": 0.8}     # threshold of the first exit
# The page opens with the preset at which every example prompt agrees well with the full model and none begins to loop
# (`training.defaults`). The library's own default stays CASCADE_THRESHOLD: a program chooses its speed and quality.
DEFAULT_PRESET = "Careful"
DEFAULT_THRESHOLD = PRESETS[DEFAULT_PRESET]
EXACT = "Exact"             # the third panel in verified mode
