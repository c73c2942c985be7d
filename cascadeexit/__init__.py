"""CascadeExit: adaptive early-exit decoding of language models, with exact KV caches and a lossless mode."""

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.custom_generate import generate
from cascadeexit.engine import Engine, Generation
from cascadeexit.events import Span, Status, TokenEvent
from cascadeexit.exits import ExitBank, ExitConfig
from cascadeexit.hub import load
from cascadeexit.metrics import RunStats, summarize
from cascadeexit.model import SegmentedModel
from cascadeexit.race import race

__version__ = "1.0.0"

__all__ = ["DecodeConfig", "Engine", "ExitBank", "ExitConfig", "Generation", "Mode", "RunStats", "SegmentedModel",
           "Span", "Status", "TokenEvent", "generate", "load", "race", "summarize"]
