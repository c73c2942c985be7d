"""Exits of a frozen model: trainable modules, and the files of their weights. Backends run exits fast."""

from cascadeexit.exits.adapters import ADAPTERS, CarryAdapter, Drafter, ExitAdapter
from cascadeexit.exits.bank import ExitBank, download
from cascadeexit.exits.confidence import ConfidenceHead, SketchConfidence
from cascadeexit.exits.config import CONFIG_FILE, WEIGHTS_FILE, ExitConfig, read_config

__all__ = ["ADAPTERS", "CONFIG_FILE", "WEIGHTS_FILE", "CarryAdapter", "ConfidenceHead", "Drafter", "ExitAdapter",
           "ExitBank", "ExitConfig", "download", "SketchConfidence", "read_config"]
