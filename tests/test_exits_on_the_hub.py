"""Exits on the Hub: what is uploaded comes back the same. A folder stands in for the Hub."""

import fnmatch
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError

from cascadeexit import ExitBank, hub
from cascadeexit.calibration import Calibration
from cascadeexit.exits import bank
from tests.tiny_models import tiny_base, tiny_engine
from tests.tiny_text import tiny_tokenizer

REPOSITORY = "someone/tiny-exits"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Folder of a local Hub: uploads go there, and downloads come from there."""
    folder = tmp_path / "hub"

    def upload(api, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, folder / repo_id)

    def download(repo_id, *, allow_patterns, **options):
        if not (folder / repo_id).is_dir():
            raise LocalEntryNotFoundError("no such repository, and no network")
        fetched = tmp_path / "fetched"
        fetched.mkdir()
        for path in (folder / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, fetched)
        return str(fetched)

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(bank, "snapshot_download", download)
    return folder


@pytest.fixture
def exits():
    """Random exits with a calibration."""
    made = tiny_engine().bank
    made.calibration = Calibration.of({0.9: [0.0] * 50}, {0.9: 0.8}, exits=made.fingerprint(), tokens=8, delta=0.1)
    return made


def test_uploaded_exits_come_back_the_same(server, exits, tmp_path):
    exits.push_to_hub(REPOSITORY)
    names = {path.name for path in (server / REPOSITORY).iterdir()}
    assert names == {"README.md", "config.json", "exits.safetensors", "calibration.json"}, "no pickles"
    found = ExitBank.load(hub.find_exits("tiny", REPOSITORY))
    assert found.config == exits.config and found.calibration == exits.calibration
    assert all(torch.equal(value, exits.state_dict()[name]) for name, value in found.state_dict().items())
    assert not (tmp_path / "fetched" / "README.md").exists(), "only what loading needs is downloaded"


def test_the_card_describes_the_exits(server, exits):
    exits.push_to_hub(REPOSITORY)
    card = (server / REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: cascadeexit\n") and "early-exit" in card
    assert "after layers 2, 3, 5 of 6" in card and "There is no drafter." in card and "{{" not in card


def test_load_takes_exits_of_the_hub(server, exits, tmp_path):
    exits.push_to_hub(REPOSITORY)
    tiny_base().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    engine, _ = hub.load(str(tmp_path / "model"), REPOSITORY, dtype="float32", self_check=False)
    assert engine.bank.fingerprint() == exits.fingerprint() and engine.bank.calibration


def test_saved_exits_are_read_by_from_pretrained(exits, tmp_path):
    exits.save_pretrained(tmp_path / "exits")
    assert ExitBank.from_pretrained(tmp_path / "exits").fingerprint() == exits.fingerprint()


def test_exits_that_are_nowhere_say_what_to_do(server):
    with pytest.raises(hub.ModelUnavailable, match="someone/tiny-exits are not a local folder.*HF_TOKEN"):
        hub.find_exits("tiny", REPOSITORY)
