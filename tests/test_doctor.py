"""The doctor and the start of the page: each thing that can be missing is named, with what to do."""

import functools
import json
import sys

import pytest
import torch

import app
from cascadeexit import accelerator, backends, doctor, selfcheck
from cascadeexit.backends.cpu import build
from tests.tiny_models import tiny_base
from tests.tiny_text import tiny_tokenizer

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\nGCC version: 9"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with little to measure, no driver and no variables that matter; returns the driver's file."""
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATOR", "SPACE_HARDWARE", "SPACE_ID", "SPACES_ZERO_GPU",
                 "CASCADEEXIT_KERNELS", "CASCADEEXIT_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerator, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_MEGABYTES", 1)
    monkeypatch.setattr(build, "library", functools.cache(build.library.__wrapped__))
    return tmp_path / "version"


@pytest.fixture
def folder(tmp_path):
    tiny_base("qwen3").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize("text, version", [(DRIVER, "470.82.01"), (OPEN_DRIVER, "550.54.15"), ("?", "unknown"),
                                           (None, None)])
def test_the_drivers_version_is_read(machine, text, version):
    if text is not None:
        machine.write_text(text)
    assert accelerator.nvidia_driver() == version


@pytest.mark.parametrize("cuda, variables, words", [
    (None, {}, "build for the CPU. Install one for CUDA"),
    ("12.8", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is '', which hides all devices. Unset it"),
    ("12.8", {"CUDA_VISIBLE_DEVICES": "-1"}, "hides all devices"),
    ("12.8", {}, "driver 470.82.01. The driver is probably too old: update it"),
    ("12.8", {"CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES is '7': check that this device exists"),
], ids=["cpu-build", "hidden", "hidden-by-minus-one", "old-driver", "wrong-number"])
def test_a_device_that_torch_cannot_see_is_explained(machine, monkeypatch, folder, cuda, variables, words):
    machine.write_text(DRIVER)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert words in accelerator.cuda_problem(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    report = doctor.examine(folder, dtype="float32", device="cpu")
    assert any(words in problem for problem in report.problems) and report.facts["NVIDIA driver"] == "470.82.01"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator.cuda_problem(variables) is None


def test_a_machine_without_an_nvidia_driver_lacks_nothing(folder):
    report = doctor.examine(folder, dtype="float32")
    assert report.problems == [] and "All is well" in report.text()
    assert report.facts["NVIDIA driver"] == "none" and report.facts["device"] == "cpu"
    assert report.facts["backend"] == "torch" and "need bfloat16" in report.facts["not cpu"]
    assert report.facts["self-check"].startswith("passed") and "GB/s" in report.facts["read bandwidth"]


def test_a_missing_compiler_is_named(monkeypatch, folder):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    report = doctor.examine(folder, dtype="bfloat16")
    assert report.facts["backend"] == "torch" and report.facts["cpu: compiler"] == "none"
    assert any("apt-get install g++" in problem for problem in report.problems)


def test_disabled_kernels_are_named(monkeypatch, folder):
    monkeypatch.setenv("CASCADEEXIT_KERNELS", "0")
    assert any("unset this variable" in problem for problem in doctor.examine(folder, dtype="bfloat16").problems)


def test_kernels_of_other_versions_are_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("CASCADEEXIT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "library", lambda: None)
    (tmp_path / "kernels-0123.so").write_text("")
    assert "1 files kernels-*.so" in build.facts()["kernels out of date"]


def test_a_failed_self_check_needs_attention(monkeypatch, folder):
    def fail(engine, reference):
        return selfcheck.SelfCheck(engine.model.backend.name, "its layers differed", 0.1)

    monkeypatch.setattr(selfcheck, "check", fail)
    report = doctor.examine(folder, dtype="float32")
    assert any("its layers differed" in problem for problem in report.problems)
    assert report.facts["self-check"].startswith("failed")


def test_a_model_that_cannot_be_loaded_is_a_problem(tmp_path):
    assert any("no folder" in problem for problem in doctor.examine(str(tmp_path / "nowhere")).problems)
    assert any("cuda:7" in problem for problem in doctor.examine(device="cuda:7").problems)


@pytest.mark.parametrize("device, status", [("cpu", 0), ("cuda:7", 1)])
def test_the_exit_status_tells_whether_something_needs_attention(monkeypatch, folder, capsys, device, status):
    monkeypatch.setattr(sys, "argv", ["doctor", "--model", folder, "--dtype", "float32", "--device", device, "--json"])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == status
    assert bool(json.loads(capsys.readouterr().out)["problems"]) == bool(status)


def test_a_backend_without_facts_is_no_error(monkeypatch):
    class Bare:
        name = "bare"

        @classmethod
        def fits(cls, base):
            return False

    monkeypatch.setitem(backends.BACKENDS, "bare", Bare)
    assert backends.facts("bare") == {} and "does not fit" in backends.why_not(tiny_base())["bare"]


# -- Spaces ----------------------------------------------------------------------------------------------------------


GPU_SPACE = {"SPACE_ID": "me/page", "ACCELERATOR": "l4x1"}


@pytest.mark.parametrize("variables", [
    {}, {"ACCELERATOR": "l4x1"}, {"SPACE_ID": "me/page"}, GPU_SPACE | {"ACCELERATOR": "none"},
    GPU_SPACE | {"ACCELERATOR": "cpu-basic"}, GPU_SPACE | {"SPACES_ZERO_GPU": "true"},
], ids=["local", "local-with-variable", "unknown-space", "none", "cpu-space", "zero-gpu"])
def test_other_spaces_and_local_machines_start(variables):
    assert accelerator.space_problem(variables) is None


@pytest.mark.parametrize("variables", [GPU_SPACE, {"SPACE_ID": "me/page", "SPACE_HARDWARE": "t4-small"}])
def test_a_gpu_space_that_torch_cannot_use_stops_with_a_message(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit, match="this Space has a GPU .*but torch cannot use it.*no NVIDIA driver"):
        app.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator.space_problem() is None
