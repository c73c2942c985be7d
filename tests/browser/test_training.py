"""The button with which the owner of a machine trains exits: progress, new exits in the page, and failure."""

import dataclasses
import time

import pytest
import torch

from cascadeexit.library import Library, Offer
from tests.browser.driving import close_settings, open_settings, run_to_end
from tests.browser.server import serve_library
from tests.tiny_models import tiny_base, tiny_engine
from tests.tiny_text import tiny_tokenizer
from training import quick
from training.quick import Progress

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model without exits, and trained exits of it."""
    model, exits = (tmp_path_factory.mktemp("training") / name for name in ("tiny-model", "exits"))
    tiny_base("qwen3", dtype=torch.bfloat16).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    bank = tiny_engine("qwen3", dtype=torch.bfloat16, layers=(1, 4)).bank
    bank.config = dataclasses.replace(bank.config, trained=True)
    bank.save(exits)
    return model, exits


@pytest.fixture(scope="module")
def url(folders):
    with serve_library(Library([Offer("tiny-model", str(folders[0]))]), allow_training=True) as url:
        yield url


def status(page) -> str:
    return page.locator("#ce-train-status").inner_text()


def test_exits_are_trained_from_the_page_and_used(open_page, url, folders, monkeypatch):
    asked = []

    def train(model):
        asked.append(model)
        yield Progress("writing text", 0.25)
        if len(asked) == 1:
            raise ValueError("writing text failed: the disk is <full>")
        return folders[1], "Trained in 14.0 minutes."

    monkeypatch.setattr(quick, "trained_exits", train)
    page = open_page(url)
    open_settings(page)
    assert "about 15 minutes on a CPU" in page.locator("#ce-train-words").inner_text()
    page.click("#ce-train")
    page.get_by_text("writing text failed: the disk is <full>").wait_for()
    page.click("#ce-train")
    page.get_by_text("Trained in 14.0 minutes.").wait_for()
    assert asked == [str(folders[0])] * 2
    close_settings(page)
    page.locator(".ce-legend").get_by_text("after layer 4").wait_for()
    assert page.locator(".ce-legend").get_by_text("after layer").count() == 2
    run_to_end(page)
    assert "Early exits are switched off" not in page.locator("#ce-view").inner_text()


def test_a_training_that_is_cancelled_is_ended(open_page, url, monkeypatch):
    ended = []

    def train(model):
        try:
            while True:
                yield Progress("training exits", 0.5)
                time.sleep(0.05)
        finally:
            ended.append(model)

    monkeypatch.setattr(quick, "trained_exits", train)
    page = open_page(url)
    open_settings(page)
    page.click("#ce-train")
    page.get_by_text("training exits; 50% of the whole training is done").wait_for()
    page.click("#ce-train-cancel")
    page.get_by_text("continues where the training stopped").wait_for()
    for _ in range(100):
        if ended:
            return
        page.wait_for_timeout(100)
    pytest.fail(f"the training goes on: {status(page)}")


def test_a_visitor_of_another_page_cannot_train(open_page, tiny_url):
    page = open_page(tiny_url)
    open_settings(page)
    assert page.locator("#ce-train").count() == 0
