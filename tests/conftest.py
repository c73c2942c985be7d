"""Fixtures that all tests share, and the order in which tests run."""

import importlib.util
import os

import pytest
import torch

from cascadeexit.engine import Engine
from tests.tiny_models import FAMILIES, tiny_base, tiny_engine
from tests.tiny_text import tiny_tokenizer
from tests.zerogpu import simulated_space

if os.environ.get("PYTEST_XDIST_WORKER"):       # as many processes as processors
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The recipe, which takes longest, goes first, pages go last: with -n the other process is nearly through then."""
    items.sort(key=lambda item: (item.path.name != "test_recipe.py") + (item.path.parent.name == "browser"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n: tests are given to the processes by `tests.lots`."""
    from tests.lots import Lots

    config.option.loadscopereorder = False          # else the largest lot, the pages, would come first
    return Lots(config, log)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(params=["swiglu", "carry"])
def adapter(request) -> str:
    return request.param


@pytest.fixture
def engine(adapter) -> Engine:
    """Engine with both shipped kinds of exits: `swiglu` with an MLP estimator, `carry` with a sketch estimator."""
    return tiny_engine(adapter=adapter, **dict(confidence="sketch", sketch_size=40) if adapter == "carry" else {})


@pytest.fixture(scope="session")
def zerogpu_model(tmp_path_factory):
    """Folder of a tiny model that the simulated ZeroGPU Space serves: one that our C++ kernels can run."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_base("qwen3", seed=3, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def zerogpu(tmp_path_factory, zerogpu_model):
    """A simulated ZeroGPU Space; see tests/zerogpu.py."""
    if os.name != "posix" or importlib.util.find_spec("spaces") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no package `spaces` here, or no fork")
    with simulated_space(tmp_path_factory.mktemp("space"), zerogpu_model) as space:
        yield space
