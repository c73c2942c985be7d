"""ExitBank: all exits of one model as a trainable module, and the files in which they are saved.

The files are config.json and exits.safetensors. Calibrated exits also have calibration.json. Decoding does not call the
bank itself. It uses the runtime that `backend.exits(bank)` makes.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascadeexit.artifact import check_finite, check_tensors
from cascadeexit.calibration import Calibration
from cascadeexit.exits.adapters import ADAPTERS, Drafter
from cascadeexit.exits.confidence import ConfidenceHead, SketchConfidence
from cascadeexit.exits.config import CONFIG_FILE, WEIGHTS_FILE, ExitConfig, read_config

log = logging.getLogger(__name__)


_CARD = """---
{{ card_data }}
---

# Early exits for {{ config.base_model }}

Trained exits after layers {{ config.layers | join(", ") }} of {{ config.num_layers }}. CascadeExit decodes with them:

    from cascadeexit import load

    engine, tokenizer = load("MODEL", exits="THIS_REPOSITORY")

`MODEL` is the Hub id or the folder of {{ config.base_model }}. Adapters: `{{ config.adapter }}`. Confidence estimators:
`{{ config.confidence }}`. {{ "The exits have a drafter." if config.drafter_width else "There is no drafter." }}
"""


class ExitBank(nn.Module, ModelHubMixin, library_name="cascadeexit", tags=["early-exit", "speculative-decoding"],
               model_card_template=_CARD):
    """All trained parts of one model's exits: adapters, confidence estimators, drafter and lists of token ids.

    `load` reads trained exits, and `untrained` makes new ones for a model. The constructor alone leaves
    the norms of the adapters at 1; `untrained` copies the model's final norm into them. An `Engine` prepares the bank
    for decoding.

    Attributes:
        config: sizes and kinds of these parts.
        adapters: one for each exit, from the shallowest.
        confidence_heads: one estimator for each exit; None if the confidence is the largest softmax probability.
        drafter: the network that drafts; None if the exit before the first layer drafts.
        head_ids: token ids of the trimmed head, a head for only the most frequent tokens, in order of frequency. None
            if the exits choose from the whole vocabulary.
        sketch_ids: ids of the tokens whose logits the `SketchConfidence` estimators read; None without such
            estimators.
        calibration: measured thresholds of these exits; None if they were not calibrated.
    """

    def __init__(self, config: ExitConfig):
        super().__init__()
        self.config = config
        self.adapters = nn.ModuleList(
            ADAPTERS[config.adapter](config.hidden_size, config.width, config.norm_eps) for _ in config.layers)
        self.confidence_heads = None
        if config.confidence != "softmax":
            self.confidence_heads = nn.ModuleList(
                ConfidenceHead(config.hidden_size, config.confidence_width) if config.confidence == "mlp"
                else SketchConfidence(config.confidence_width) for _ in config.layers)
        self.drafter = None
        if config.drafter_width:
            self.drafter = Drafter(config.hidden_size, config.drafter_width, len(config.layers) - 1, config.norm_eps)
        self.register_buffer("head_ids", torch.arange(config.head_size) if config.head_size else None)
        self.register_buffer("sketch_ids", torch.arange(config.sketch_size) if config.sketch_size else None)
        self.calibration: Calibration | None = None

    @classmethod
    def untrained(cls, model, *, confidence: str = "softmax", **shape) -> Self:
        """Make untrained exits for a model: each adapter only applies the final norm of the model (the logit lens).

        Args:
            model: a `SegmentedModel`; the bank gets its exit layers.
            confidence: kind of confidence estimator, as in `ExitConfig`.
            shape: more fields of `ExitConfig`.

        Raises ValueError if these fields contradict each other.
        """
        config = ExitConfig(base_model=model.name, hidden_size=model.hidden_size, num_layers=model.num_layers,
                            vocab_size=model.vocab_size, layers=model.exit_layers, confidence=confidence,
                            norm_eps=getattr(model.config, "rms_norm_eps", 1e-5),
                            head_fingerprint=model.head_fingerprint, **shape)
        bank = cls(config)
        for adapter in bank.adapters:
            adapter.norm.weight.data.copy_(model.norm_weight)
        return bank

    def prepare(self, model) -> Self:
        """Freeze the exits and move them to the device of a `SegmentedModel`. Returns the bank.

        Adapters and drafter get the dtype of the model. Confidence estimators stay in fp32. Logs a warning if the exits
        were trained on other weights. Raises ValueError if they belong to another architecture.
        """
        c = self.config
        theirs = (c.hidden_size, c.num_layers, c.vocab_size, c.layers)
        ours = (model.hidden_size, model.num_layers, model.vocab_size, model.exit_layers)
        if theirs != ours:
            raise ValueError(f"these exits were made for {c.base_model} (hidden, layers, vocabulary, exits = "
                             f"{theirs}); {model.name} has {ours}. Use exits of this model, or none.")
        if c.head_fingerprint and c.head_fingerprint != model.head_fingerprint:
            log.warning("The exits were trained on other weights of %s than the ones loaded (the heads differ): "
                        "verified stays lossless, but confidences may be wrong.", c.base_model)
        self.to(model.device).eval().requires_grad_(False)
        self.adapters.to(model.dtype)
        if self.drafter:
            self.drafter.to(model.dtype)
        return self

    @property
    def sketch_places(self) -> dict[int, int]:
        """Index of each token in `sketch_ids`, as {token id: index}; {} without a sketch estimator."""
        return {} if self.sketch_ids is None else {word: i for i, word in enumerate(self.sketch_ids.tolist())}

    def fingerprint(self) -> str:
        """Return a hash that identifies these exits, so that a result can name the exits that made it.

        It is SHA-256 over weights in fp32, lists of token ids and head sizes, shortened to 16 hex digits. The drafter
        is left out, because it changes neither the choices nor the confidences of an exit.
        """
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("drafter.")}
        return _digest(state, repr(self.config.head_sizes) if self.config.head_sizes else "")

    def drafter_fingerprint(self) -> str | None:
        """Return a hash that identifies the drafter; None without a drafter.

        It is SHA-256 over the drafter's weights in fp32, shortened to 16 hex digits. The drafter affects the speed of
        `verified`.
        """
        return _digest(self.drafter.state_dict()) if self.drafter else None

    # -- artifact -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write config.json and exits.safetensors to a folder.

        Each file is written under another name first and then renamed, so that nobody reads an incomplete file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / (WEIGHTS_FILE + ".tmp"), folder / (CONFIG_FILE + ".tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, weights)
        config.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(config, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read exits that `save` wrote, with their calibration if there is one.

        Raises FileNotFoundError if a file is missing, and ValueError if files are damaged or do not fit together. The
        message names the file and, if there is one, the key or the tensor. Shapes are compared before memory is
        allocated for them.
        """
        folder = Path(folder)
        config, path = read_config(folder), Path(folder) / WEIGHTS_FILE
        with torch.device("meta"):          # shapes without memory: a wrong config may ask for any amount of it
            wanted = cls(config).state_dict()
        check_tensors(path, wanted)
        bank = cls(config)
        bank.load_state_dict(load_file(path))
        check_finite(path, bank.named_parameters())
        bank._check_words(path)
        bank.calibration = Calibration.load(folder)
        if bank.calibration and bank.calibration.exits != bank.fingerprint():
            log.warning("The calibration in %s belongs to other exits and is ignored: run python -m "
                        "training.calibrate", folder)
            bank.calibration = None
        return bank

    def generate_model_card(self, **values) -> ModelCard:
        """Make the model card that `push_to_hub` uploads. `values` are more values for its template."""
        return super().generate_model_card(config=self.config, **values)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the files that `save_pretrained` and `push_to_hub` publish."""
        self.save(save_directory)
        if self.calibration:
            self.calibration.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None = None, cache_dir: str | Path | None = None,
                         force_download: bool = False, local_files_only: bool = False,
                         token: str | bool | None = None, **_) -> Self:
        """Load exits from a folder or a Hub repository, for `from_pretrained`."""
        if Path(model_id).is_dir():
            return cls.load(model_id)
        return cls.load(download(model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                                 local_files_only=local_files_only, token=token))

    def _check_words(self, path: Path) -> None:
        """Raise ValueError if `head_ids` or `sketch_ids` has a token id outside the vocabulary. `path`: their file."""
        for name in ("head_ids", "sketch_ids"):
            ids = getattr(self, name)
            bad = [] if ids is None else ids[(ids < 0) | (ids >= self.config.vocab_size)].tolist()
            if bad:
                raise ValueError(f"{path}: {name} must be token ids in 0..{self.config.vocab_size - 1}, got {bad[:5]}: "
                                 "the file is damaged, or belongs to another model")


def download(repo_id: str, **options) -> Path:
    """Download the exits of a Hub repository to the Hub cache. Returns their folder.

    Only JSON and safetensors files are downloaded.

    options: more arguments of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises the errors of `snapshot_download`.
    """
    return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"], **options))


def _digest(state: dict[str, Tensor], begin: str = "") -> str:
    """Return the first 16 hex digits of SHA-256 over named tensors in fp32.

    begin: text that is hashed before the tensors.
    """
    digest = hashlib.sha256(begin.encode())
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
