"""Exits: a small adapter and a confidence estimator behind each exit layer, and the artifact that holds them.

An adapter turns a hidden state into one that the frozen, shared head can read; it never sees the vocabulary. The
estimator says how likely that head's choice equals the full model's, from the hidden state alone, so that the one
vocabulary projection of a token is paid by the exit that is taken. Artifact: config.json + exits.safetensors.

Two kinds of adapter. `swiglu`, the published one, sees one position. `attention` is a decoder layer of its own, with
keys and values of its own, and looks back over the text; the engine feeds it every position in order.

Letters: N rows, D hidden size, V vocabulary, K words of a trimmed head, d head size, C cache slots.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascadeexit.cache import KVCache
from cascadeexit.linear import pack
from cascadeexit.model import SegmentedModel, additive_mask, attend

log = logging.getLogger(__name__)
CONFIG_FILE, WEIGHTS_FILE = "config.json", "exits.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class ExitConfig:
    """What is saved beside the weights: the shape of the exits and the model they belong to."""

    base_model: str
    """Short name of the base model."""
    hidden_size: int
    num_layers: int
    """Layers of the base model."""
    vocab_size: int
    layers: tuple[int, ...]
    """Layers after which an exit sits."""
    adapter: str = "swiglu"
    """'swiglu', as published, or 'attention'."""
    width: int = 512
    """Inner width of the adapter's SwiGLU; 512 as published."""
    num_heads: int = 0
    """Of an attention adapter: query heads, key-value heads and their size."""
    num_kv_heads: int = 0
    head_dim: int = 0
    confidence_width: int = 256
    """Inner width of the estimator; 256 as published."""
    confidence: str = "mlp"
    """'mlp': the trained estimator. 'softmax': the largest probability of the exit's head, for untrained exits."""
    head_size: int = 0
    """Words in the exits' trimmed head; 0 = the whole vocabulary."""
    norm_eps: float = 1e-5
    head_fingerprint: str = ""
    """SHA-256 of the base model's head, or '' when unknown."""
    trained: bool = False
    format: int = _FORMAT

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.adapter not in ("swiglu", "attention"):
            raise ValueError(f"adapter must be 'swiglu' or 'attention', got '{self.adapter}'")
        if self.adapter == "attention" and not (self.num_kv_heads and self.head_dim
                                                and self.num_heads % self.num_kv_heads == 0):
            raise ValueError("an attention adapter needs head_dim and num_heads, a multiple of num_kv_heads, got "
                             f"{self.head_dim}, {self.num_heads}, {self.num_kv_heads}")
        if self.confidence not in ("mlp", "softmax"):
            raise ValueError(f"confidence must be 'mlp' or 'softmax', got '{self.confidence}'")
        if not all(a < b for a, b in zip((0, *self.layers), (*self.layers, self.num_layers), strict=True)):
            raise ValueError(f"exit layers must ascend within 1..{self.num_layers - 1}, got {self.layers}")
        if self.format != _FORMAT:
            raise ValueError(f"these exits have format {self.format}; this version reads format {_FORMAT}")


class ExitAdapter(nn.Module):
    """h + up(silu(gate h) * down h), then a norm of its own: (..., D) -> (..., D), ready for the shared head."""

    def __init__(self, hidden_size: int, width: int, norm_eps: float):
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        # Identity at the start: training begins at the logit lens, and decay pulls towards it, not towards zero.
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, *_) -> Tensor:
        return self.norm(h + self.up(nn.functional.silu(self.gate(h)) * self.down(h)))


class AttentionAdapter(nn.Module):
    """A decoder layer of the exit's own, then a norm of its own: (B, N, D) -> (B, N, D), ready for the shared head.

    Laid out as a Llama layer with rotary positions, so it can start as a copy of one; both branches start at zero
    otherwise, which makes it the logit lens.
    """

    def __init__(self, c: ExitConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.attention_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.query = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.key = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.value = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.output = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.gate = nn.Linear(c.hidden_size, c.width, bias=False)
        self.down = nn.Linear(c.hidden_size, c.width, bias=False)
        self.up = nn.Linear(c.width, c.hidden_size, bias=False)
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache: KVCache | None = None, index: int = 0) -> Tensor:
        """Rows (B, N, D) in order; with a cache they follow what it holds at `index`.

        angles: cosines and sines of their positions, (1, N, d) each. mask: see `attend`; None: causal, no cache.
        """
        b, n, _ = h.shape
        x = self.attention_norm(h)
        query, key, value = (projection(x).view(b, n, -1, self.head_dim).transpose(1, 2)
                             for projection in (self.query, self.key, self.value))
        query, key = rotate(query, angles), rotate(key, angles)
        if mask is None:
            seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            key, value = (key, value) if cache is None else cache.update(key, value, index)
            seen = attend(query, key, value, mask)
        h = h + self.output(seen.transpose(1, 2).flatten(2))
        x = self.mlp_norm(h)
        return self.norm(h + self.up(nn.functional.silu(self.gate(x)) * self.down(x)))


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021), halves as in Llama: (B, H, N, d), angles (1, N, d) each."""
    cos, sin = (a[:, None].to(x.dtype) for a in angles)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class ConfidenceHead(nn.Module):
    """Will this exit's choice equal the full model's? Adapted hidden (..., D) -> logit (...,), always in fp32."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.silu(self.inner(hidden.to(self.inner.weight.dtype)))
        return self.outer(inner).squeeze(-1).float()


class ExitBank(nn.Module):
    """All exits of one model. `attach` it to the model before asking it for logits."""

    def __init__(self, config: ExitConfig):
        super().__init__()
        self.config = config
        self.adapters = nn.ModuleList(
            AttentionAdapter(config) if config.adapter == "attention"
            else ExitAdapter(config.hidden_size, config.width, config.norm_eps) for _ in config.layers)
        self.confidence_heads = nn.ModuleList(ConfidenceHead(config.hidden_size, config.confidence_width)
                                              for _ in config.layers) if config.confidence == "mlp" else None
        self.register_buffer("head_ids", torch.arange(config.head_size) if config.head_size else None)
        self._project: Callable[[Tensor], Tensor] | None = None
        self._model: SegmentedModel | None = None

    @property
    def looks_back(self) -> bool:
        """True when an exit must see every position of the text, not only the newest."""
        return self.config.adapter == "attention"

    @classmethod
    def untrained(cls, model: SegmentedModel, *, confidence: str = "softmax", **shape) -> Self:
        """Exits that start as the logit lens of this model: identity adapters with the model's final norm."""
        if shape.get("adapter") == "attention":
            shape |= dict(num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)
        config = ExitConfig(base_model=model.name, hidden_size=model.hidden_size, num_layers=model.num_layers,
                            vocab_size=model.vocab_size, layers=model.exit_layers, confidence=confidence,
                            norm_eps=getattr(model.config, "rms_norm_eps", 1e-5),
                            head_fingerprint=model.head_fingerprint, **shape)
        bank = cls(config)
        for adapter in bank.adapters:
            adapter.norm.weight.data.copy_(model.norm.weight)
        return bank

    def attach(self, model: SegmentedModel) -> Self:
        """Move to the model's device and dtype and share its head; `head_bytes` is what one projection reads.

        Raises ValueError when the exits belong to another architecture; warns when only the weights differ.
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
        self.to(model.device, model.dtype).eval().requires_grad_(False)
        if self.confidence_heads is not None:
            self.confidence_heads.float()
        weight = model.head_weight.detach() if self.head_ids is None else model.head_weight.detach()[self.head_ids]
        # Not modules of the bank: head and rotary embedding belong to the base model and must not be saved with it.
        object.__setattr__(self, "_model", model)
        self._project, self.head_bytes = pack(weight).forward, weight.nbytes
        return self

    # -- one exit, hidden rows in --------------------------------------------------------------------------------

    def new_cache(self, capacity: int) -> KVCache | None:
        """Keys and values of one text at each exit, None for exits that do not look back."""
        c, model = self.config, self._model
        return KVCache(len(c.layers), c.num_kv_heads, c.head_dim, capacity, dtype=model.dtype,
                       device=model.device) if self.looks_back else None

    def hidden(self, s: int, rows: Tensor, cache: KVCache | None = None) -> Tensor:
        """The next rows after segment s, in order (1, N, D) -> adapted hidden of the newest (1, D)."""
        adapter, n = self.adapters[s], rows.shape[1]
        if cache is None:
            return adapter(rows[0, -1:])
        padded = self._model.pad_rows(rows)
        mask = additive_mask(cache.mask(s, padded.shape[1]), self.config.num_heads // self.config.num_kv_heads,
                             rows.dtype)
        out = adapter(padded, self._model.angles(cache.positions(s, padded.shape[1])), mask, cache, s)
        cache.advance(range(s, s + 1), n)
        return out[0, n - 1:n]

    def hidden_of_text(self, s: int, h: Tensor) -> Tensor:
        """All positions of whole texts after segment s, from the first on (B, T, D) -> adapted hidden (B, T, D)."""
        if not self.looks_back:
            return self.adapters[s](h)
        return self.adapters[s](h, self._model.angles(torch.arange(h.shape[1], device=h.device)[None]))

    def logits(self, hidden: Tensor) -> Tensor:
        """Adapted hidden (..., D) -> logits over the exits' head (..., V) or (..., K); see `token_id`."""
        return self._project(hidden)

    def confidence(self, s: int, hidden: Tensor) -> Tensor:
        """Probability that exit s chooses what the full model would: adapted hidden (..., D) -> (...,) in [0, 1]."""
        if self.confidence_heads is None:
            return self.logits(hidden).float().softmax(-1).amax(-1)
        return self.confidence_heads[s](hidden).sigmoid()

    # -- bytes, for the cost metric ------------------------------------------------------------------------------

    def try_bytes(self, s: int) -> int:
        """Weight bytes read to ask exit s how sure it is."""
        read = sum(p.nbytes for p in self.adapters[s].parameters())
        if self.confidence_heads is None:
            return read + self.head_bytes
        return read + sum(p.nbytes for p in self.confidence_heads[s].parameters())

    def fingerprint(self) -> str:
        """SHA-256 over names and fp32 bytes of the exits' weights: tells which exits made a result."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- artifact -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write config.json and exits.safetensors; a reader never sees half a file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / (WEIGHTS_FILE + ".tmp"), folder / (CONFIG_FILE + ".tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, weights)
        config.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(config, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read an artifact written by `save`.

        Raises FileNotFoundError when a file is missing, ValueError when the two files do not fit together.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}; exits are two files: {CONFIG_FILE}, {WEIGHTS_FILE}")
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        try:
            bank = cls(ExitConfig(**fields))
            bank.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no exits that this version can read: {error}") from error
        return bank
