"""Many prompts: three sources, live numbers, and results that stay after Cancel."""

import json
import time

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

REMEMBER_STATUS = """() => {
  const status = document.querySelector("#ce-many-status");
  window.statuses = [];
  new MutationObserver(() => window.statuses.push(status.innerText)).observe(
      status, {subtree: true, childList: true, characterData: true, attributes: true});
}"""


@pytest.fixture
def many(page):
    page.get_by_role("tab", name="Many prompts").click()
    page.wait_for_selector("#ce-evaluate")
    return page


def test_pasted_prompts_are_evaluated_and_saved(many, tmp_path):
    assert many.input_value("#ce-pasted textarea") == "" and many.locator("#ce-cancel").is_disabled()
    many.fill("#ce-pasted textarea", "hi there\n<img src=x onerror=alert(1)>\n" + "sky " * 300)
    many.click("#ce-evaluate")
    many.wait_for_selector("#ce-many-status .ce-status.done")
    expect(many.locator("#ce-cancel")).to_be_disabled()
    status = many.locator("#ce-many-status").inner_text()
    assert "3 of 3 prompts" in status and "1 could not run" in status and "agreement" in status
    assert many.locator("#ce-results img").count() == 0
    many.wait_for_selector("#ce-chart .main-svg")
    with many.expect_download() as download:
        many.get_by_text("Save all (JSON)").click()
    download.value.save_as(tmp_path / "all.json")
    file = json.loads((tmp_path / "all.json").read_text())
    assert [r["prompt"] for r in file["results"]][0] == "hi there" and "positions" in file["results"][2]["error"]


def test_a_file_of_prompts_is_evaluated(many, tmp_path):
    (tmp_path / "set.csv").write_text("kind,prompt\ncode,one\nchat,two\n")
    many.set_input_files("#ce-prompt-file input[type=file]", tmp_path / "set.csv")
    many.wait_for_selector("#ce-prompt-file :text('set.csv')")
    many.click("#ce-evaluate")
    many.wait_for_selector("#ce-many-status .ce-status.done")
    assert "2 of 2 prompts" in many.locator("#ce-many-status").inner_text()


def test_a_bad_set_gets_a_message(many):
    many.fill("#ce-pasted textarea", '{"prompt": 5}')
    many.click("#ce-evaluate")
    many.wait_for_selector("#ce-many-status .ce-status.error")
    assert "line 1: expected a text" in many.locator("#ce-many-status").inner_text()
    expect(many.locator("#ce-cancel")).to_be_disabled()


def test_cancelling_keeps_the_results_so_far(many, tiny, monkeypatch):
    fast, made = tiny[0].generate, []

    def generate(ids, config):
        for event in fast(ids, config):
            time.sleep(0.004 if len(made) < 800 else 0.05)          # the third prompt would take 20 s
            made.append(event)
            yield event
    monkeypatch.setattr(tiny[0], "generate", generate)
    many.fill("#ce-pasted textarea", "\n".join(f"prompt {i}" for i in range(20)))
    many.click("#ce-evaluate")
    many.wait_for_function("/^[23] of 20/.test(document.querySelector('#ce-many-status').innerText.trim())")
    many.evaluate(REMEMBER_STATUS)
    many.click("#ce-cancel")
    many.wait_for_selector("#ce-many-status .ce-status.stopped")
    status = many.locator("#ce-many-status").inner_text()
    many.wait_for_timeout(3000)
    stopped = len(made)
    many.wait_for_timeout(800)
    assert len(made) == stopped, "cancelling did not stop the run of a prompt"
    assert many.locator("#ce-many-status").inner_text().strip() == status.split("\n")[-1] and "stopped" in status
    assert " left" not in status, "no time is left when nothing runs"
    assert not [text for text in many.evaluate("window.statuses") if "Error" in text]
    assert "prompt 1" in many.locator("#ce-results").inner_text()
    assert many.get_by_text("Save table (CSV)").is_enabled() and many.locator("#ce-cancel").is_disabled()
