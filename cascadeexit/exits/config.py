"""ExitConfig: describes the exits of a model and the model itself. It is saved beside the weights of the exits."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from cascadeexit.artifact import check_keys, read_object
from cascadeexit.exits.adapters import ADAPTERS
from cascadeexit.values import flag, number, shown, whole

CONFIG_FILE, WEIGHTS_FILE = "config.json", "exits.safetensors"
WORD_BLOCK = 32         # part sizes of a head are multiples of it: the largest weight block of any backend
MOST_LAYERS, MOST_WORDS, MOST_WIDTH = 1_000, 4_194_304, 65_536      # largest sizes of a model and of its exits
_FORMAT = 3
# For each field that is a whole number: the smallest and the largest value.
_SIZES = dict(hidden_size=(1, MOST_WIDTH), num_layers=(1, MOST_LAYERS), vocab_size=(1, MOST_WORDS),
              width=(1, MOST_WIDTH), confidence_width=(1, MOST_WIDTH), sketch_size=(0, MOST_WORDS),
              head_size=(0, MOST_WORDS), draft_size=(0, MOST_WORDS), drafter_width=(0, MOST_WIDTH),
              format=(0, 1_000))


@dataclass(frozen=True)
class ExitConfig:
    """Kinds and sizes of the exits of a model, and the sizes of the model.

    Raises ValueError if fields contradict each other.
    """

    base_model: str
    """Short name of the model that the exits belong to."""
    hidden_size: int
    num_layers: int
    """Number of layers of the base model."""
    vocab_size: int
    layers: tuple[int, ...]
    """For each exit, the number of layers below it, ascending. 0 is an exit before the first layer."""
    adapter: str = "swiglu"
    """Kind of adapter: 'swiglu' as in the original CascadeExit, or 'carry', which also reads the carried state."""
    width: int = 512
    """Inner width of the adapters. The original CascadeExit has 512."""
    confidence_width: int = 256
    """Inner width of the confidence estimators. The original CascadeExit has 256; 'sketch' usually has 48."""
    confidence: str = "mlp"
    """Kind of confidence estimator. 'mlp' is the kind of the original CascadeExit. 'sketch' reads the exit's
    probabilities of frequent tokens, and the token that n-gram lookup copies. 'softmax' is the largest probability of
    the exit, for untrained exits."""
    sketch_size: int = 0
    """Number of tokens whose probabilities a 'sketch' estimator reads. 0 for the other kinds of estimator."""
    head_size: int = 0
    """Number of tokens in the trimmed head, from which the exits choose. They are the most frequent tokens of the
    vocabulary, in order of frequency. 0 means that the exits choose from the whole vocabulary."""
    head_sizes: tuple[int, ...] = ()
    """For each exit, the number of tokens that it chooses from: the first tokens of the trimmed head. () means that
    each exit chooses from the whole trimmed head. Deep exits predict rare tokens, and shallow exits do not."""
    draft_size: int = 0
    """Number of tokens that the draft tree chooses from: the first tokens of the trimmed head. 0 means as many as the
    first exit chooses from."""
    drafter_width: int = 0
    """Inner width of the `Drafter`. 0 means that there is no drafter. Then the exit before the first layer drafts."""
    norm_eps: float = 1e-5
    head_fingerprint: str = ""
    """SHA-256 of the base model's head; '' if it is unknown."""
    trained: bool = False
    format: int = _FORMAT

    def __post_init__(self):
        for name, value in self._checked_types().items():
            object.__setattr__(self, name, value)
        if not self.layers:
            raise ValueError("exits need at least one exit layer, got none")
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {', '.join(ADAPTERS)}, got {shown(self.adapter)}")
        if self.confidence not in ("mlp", "sketch", "softmax"):
            raise ValueError(f"confidence must be 'mlp', 'sketch' or 'softmax', got {shown(self.confidence)}")
        if (self.confidence == "sketch") != (self.sketch_size > 0):
            raise ValueError(f"sketch_size must be above 0 for confidence 'sketch' and 0 for the others, got "
                             f"{self.sketch_size} for '{self.confidence}'")
        if self.head_size > self.vocab_size:
            raise ValueError(f"head_size must be at most {self.vocab_size}, the vocabulary; got {self.head_size}")
        if self.head_sizes and (len(self.head_sizes) != len(self.layers) or max(self.head_sizes) != self.head_size
                                or any(n < 1 or n % WORD_BLOCK and n != self.head_size for n in self.head_sizes)):
            raise ValueError(f"head_sizes must have a number for each of {len(self.layers)} exits, each a multiple of "
                             f"{WORD_BLOCK} or head_size itself, and the largest must be head_size, "
                             f"{self.head_size}; got {shown(self.head_sizes)}")
        most = self.words(0) if self.head_size else 0
        if not 0 <= self.draft_size <= most or self.draft_size % WORD_BLOCK:
            raise ValueError(f"draft_size must be a multiple of {WORD_BLOCK} and at most {most}, the number of "
                             f"tokens in the first exit's trimmed head; got {self.draft_size}")
        if self.drafter_width and (self.layers[:1] != (0,) or len(self.layers) < 2):
            raise ValueError("a drafter needs an exit before the first layer and a deeper one, got "
                             f"{shown(self.layers)}")
        if not all(a < b for a, b in zip((-1, *self.layers), (*self.layers, self.num_layers), strict=True)):
            raise ValueError(f"exit layers must ascend within 0..{self.num_layers - 1}, got {shown(self.layers)}")
        if self.format != _FORMAT:
            raise ValueError(f"these exits have format {self.format}; this version reads format {_FORMAT}: train them "
                             "anew with training/run.sh, or use the version that made them")

    def _checked_types(self) -> dict[str, object]:
        """Return all fields with Python's own types. Raises ValueError for a field of a wrong type or size."""
        found = {name: whole(name, getattr(self, name), *limits) for name, limits in _SIZES.items()}
        for name in ("base_model", "adapter", "confidence", "head_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {shown(getattr(self, name))}")
        for name, most in (("layers", MOST_LAYERS), ("head_sizes", MOST_WORDS)):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) > MOST_LAYERS:
                raise ValueError(f"{name} must be a list of at most {MOST_LAYERS:,} whole numbers, got {shown(values)}")
            found[name] = tuple(whole(f"each of {name}", value, 0, most) for value in values)
        return found | dict(norm_eps=number("norm_eps", self.norm_eps, 0, 1), trained=flag("trained", self.trained))

    def words(self, s: int) -> int:
        """Return how many tokens of the vocabulary exit number s (0 is the lowest) chooses from."""
        return self.head_sizes[s] if self.head_sizes else self.head_size or self.vocab_size

    @property
    def draft_words(self) -> int:
        """Number of tokens of the vocabulary that the draft tree chooses from."""
        return self.draft_size or self.words(0)


def read_config(folder: str | Path) -> ExitConfig:
    """Read the config in a folder of exits, without reading the weights.

    Raises FileNotFoundError if the config file or the weights file is missing, and ValueError, which names the file and
    the key, if the config is damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; exits are two files: {CONFIG_FILE}, {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    found = read_object(path)
    known = fields(ExitConfig)
    try:
        check_keys(found, [f.name for f in known if f.default is MISSING], [f.name for f in known])
        return ExitConfig(**found)
    except ValueError as error:
        raise ValueError(f"{path} describes no exits that this version can read: {error}") from None
