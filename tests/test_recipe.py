"""The whole recipe on a tiny model: it ends with exits that decode, also after a kill, with one process or several."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascadeexit import DecodeConfig, load
from cascadeexit.prompts import token_ids
from training.calibrate import prompts_of
from training.documents import load_documents

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(*args: object, launch: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", *launch, *map(str, args)]


def run(*args: object, launch: tuple[str, ...] = ()) -> str:
    done = subprocess.run(command(*args, launch=launch), cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def kill_once(file: Path, *args: object) -> None:
    """Run a command, and kill it as soon as this file exists and is not empty."""
    process = subprocess.Popen(command(*args), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (file.exists() and file.stat().st_size) and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Return the folder that `SMOKE=1 training/run.sh` has filled."""
    out = tmp_path_factory.mktemp("recipe")
    done = subprocess.run(["bash", "training/run.sh"], cwd=ROOT, text=True, capture_output=True,
                          env=ENVIRONMENT | {"SMOKE": "1", "SMOKE_OUT": str(out)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"python app.py --model {out}/model --exits {out}/exits" in done.stdout
    return out


def test_any_model_gets_trained_exits(recipe):
    engine, tokenizer = load(str(recipe / "model"), recipe / "exits")
    assert engine.bank.config.trained and engine.bank.config.adapter == "carry" and engine.num_exits == 4
    ids = token_ids(tokenizer, "hello")
    full = engine.run(ids, DecodeConfig(mode="full", max_new_tokens=24)).token_ids
    verified = engine.run(ids, DecodeConfig(mode="verified", max_new_tokens=24))
    assert verified.token_ids == full and any(e.exit == 0 for e in verified.events), "its drafter drafts"
    # How many different test prompts there are depends on what the random model writes.
    prompts = prompts_of(load_documents([recipe / "data" / "policy", recipe / "data" / "text"]), 4, seed=0)
    assert engine.bank.calibration.prompts == len(prompts) > 0 and engine.bank.drafter
    for name in ("config.json", "distill.json", "drafter.json", "confidence.json", "evaluation.json", "loss.html",
                 "reliability.html"):
        assert (recipe / "exits" / name).exists(), name


def test_exits_of_any_model_can_be_measured(recipe, tmp_path):
    shared = ("--model", recipe / "model", "--exits", recipe / "exits", "--prompts", 1, "--tokens", 6, "--max-draft", 2)
    run("training.baselines", *shared, "--out", tmp_path / "baselines.json")
    run("training.evaluate", "decode", *shared, "--thresholds", 0.5, "--out", tmp_path / "decode.json")
    rows = json.loads((tmp_path / "baselines.json").read_text())["rows"]
    assert all(r["identical"] == 1 for r in rows if r["method"] == "standard" or "self-speculation" in r["method"])
    drafts = json.loads((tmp_path / "decode.json").read_text())["self_speculation"]
    assert len(drafts) == 4 and all(row["identical"] == 1 for row in drafts)


def test_training_raises_agreement_with_the_full_model(recipe):
    """On average over the exits: there are 900 held-out tokens, and the exit before the first layer learns little."""
    report = json.loads((recipe / "exits" / "distill.json").read_text())
    gains = [after - before for before, after in zip(report["untrained_agreement"], report["held_out_agreement"])]
    assert sum(gains) / len(gains) > 0.02 and min(gains) > -0.01


def test_a_drafter_learns_and_continues_after_a_kill(recipe, tmp_path):
    report = json.loads((recipe / "exits" / "drafter.json").read_text())
    before, after = report["held_out_agreement_before"], report["held_out_agreement"]
    gain = sum(after) / 4 - sum(before) / 4
    assert len(before) == len(after) == 4 and gain > 0.005, "on average over a chain; there are few held-out tokens"
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    args = ("training.drafter", "--model", recipe / "model", "--exits", recipe / "exits", "--data",
            recipe / "data/policy", "--batch", 256, "--tail", 32, "--save-every", 4, "--mixed-precision", "no")
    run(*args, "--out", whole)
    kill_once(torn / "drafter/checkpoint.pt", *args, "--out", torn)
    assert not (torn / "exits.safetensors").exists(), "killed too late to show anything"
    run(*args, "--out", torn, launch=("torch.distributed.run", "--nproc-per-node", "1", "-m"))
    ours, theirs, exits = weights(whole), weights(torn), weights(recipe / "exits")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(ours[name], exits[name]) or name.startswith("drafter."), "exits stay as they are"
    further = tmp_path / "further"
    run(*args[:3], "--exits", whole, *args[5:], "--out", further, "--go-on", "--lr", 1e-4)
    before, after = (json.loads((folder / "drafter.json").read_text()) for folder in (whole, further))
    assert after["went_on_from"]["provenance"] == before["provenance"]
    assert after["held_out_agreement_before"] == pytest.approx(before["held_out_agreement"], abs=0.01)


def distill(recipe: Path, out: Path) -> tuple[object, ...]:
    return ("training.distill", "--model", recipe / "model", "--data", recipe / "data/policy", "--out", out,
            "--features", recipe / "exits/features", "--epochs", 2, "--batch", 512, "--width", 16, "--head-size", 128,
            "--train-words", 64, "--tail", 32, "--save-every", 4, "--mixed-precision", "no")


def losses(folder: Path) -> list[dict]:
    """Return the records of the log that hold the loss of a step."""
    return [record for record in map(json.loads, (folder / "log.jsonl").open()) if "kl" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "exits.safetensors")


def test_a_killed_training_ends_as_an_uninterrupted_one(recipe, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(*distill(recipe, whole))
    kill_once(torn / "checkpoint.pt", *distill(recipe, torn))
    assert not (torn / "exits.safetensors").exists(), "killed too late to show anything"
    run(*distill(recipe, torn))
    ours, theirs = weights(whole), weights(torn)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
    steps = [[record["step"] for record in losses(folder)] for folder in (whole, torn)]
    assert steps[0] == steps[1] == sorted(set(steps[0]))


@pytest.mark.slow
def test_a_killed_calibration_ends_as_an_uninterrupted_one(recipe, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
        for name in ("config.json", "exits.safetensors"):
            shutil.copy(recipe / "exits" / name, folder)
    args = ("--model", recipe / "model", "--data", recipe / "data/policy", "--prompts", 6, "--tokens", 40)
    run("training.calibrate", "--exits", whole, *args)
    partial = torn / "calibration.partial.jsonl"
    kill_once(partial, "training.calibrate", "--exits", torn, *args)
    assert not (torn / "calibration.json").exists(), "killed too late to show anything"
    partial.write_text(partial.read_text() + '{"torn')
    run("training.calibrate", "--exits", torn, *args)
    ours, theirs = (json.loads((folder / "calibration.json").read_text())["points"] for folder in (whole, torn))
    assert ours == theirs and not partial.exists()


@pytest.mark.slow           # test_training.py pins it, too
def test_a_checkpoint_of_other_settings_is_refused(recipe, tmp_path):
    run(*distill(recipe, tmp_path), "--minutes", 0, launch=("torch.distributed.run", "--nproc-per-node", "2", "-m"))
    done = subprocess.run(command(*distill(recipe, tmp_path), "--lr", 0.5), cwd=ROOT, env=ENVIRONMENT, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "other settings" in done.stderr and "--no-resume" in done.stderr


@pytest.mark.slow
def test_exits_that_are_not_trained_do_not_change(recipe, tmp_path):
    first, then = tmp_path / "first", tmp_path / "then"
    run(*distill(recipe, first))
    deepest = json.loads((first / "config.json").read_text())["layers"][-1]
    run(*distill(recipe, then), "--continue-from", first, "--only", deepest)
    before, after = weights(first), weights(then)
    changed = {name.split(".")[1] for name in before
               if name.startswith("adapters.") and not torch.equal(before[name], after[name])}
    stays = json.loads((then / "distill.json").read_text())["stays"]
    assert changed == (set() if deepest in stays else {"3"}), "trained, or back at its start"
    assert all(len(record["kl"]) == 1 for record in losses(then))
    done = subprocess.run(command(*distill(recipe, tmp_path / "wrong"), "--only", deepest), cwd=ROOT, env=ENVIRONMENT,
                          text=True, capture_output=True)
    assert done.returncode == 1 and "--continue-from" in done.stderr


def test_an_exit_that_more_training_made_worse_keeps_its_old_weights(recipe, tmp_path):
    run(*distill(recipe, tmp_path), "--continue-from", recipe / "exits", "--width", 32, "--head-size", 256, "--lr", 50)
    before, after = weights(recipe / "exits"), weights(tmp_path)
    assert torch.equal(before["drafter.context.weight"], after["drafter.context.weight"])
    report = json.loads((tmp_path / "distill.json").read_text())
    assert report["stays"] == report["settings"]["layers"]
    assert all(torch.equal(before[name], value) for name, value in after.items() if name.startswith("adapters."))
    assert report["held_out_agreement"] == pytest.approx(
        json.loads((recipe / "exits" / "distill.json").read_text())["held_out_agreement"], abs=0.02)


def test_two_processes_train_as_one(recipe, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(*distill(recipe, one), "--own-share", 0)
    run(*distill(recipe, two), "--own-share", 0,
        launch=("torch.distributed.run", "--nproc-per-node", "2", "-m"))
    processes = [json.loads((folder / "distill.json").read_text())["processes"] for folder in (one, two)]
    assert processes == [1, 2]
    ours, theirs = ([record["kl"] for record in losses(folder)] for folder in (one, two))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-3, rtol=1e-3)


@pytest.mark.slow           # test_training.py pins it, too
def test_shards_of_other_settings_are_refused(recipe, tmp_path):
    args = ("training.data", "policy", "--model", recipe / "model", "--batch", 32, "--steps", 96, "--out", tmp_path)
    run(*args, "--tokens", 3000)
    run(*args, "--tokens", 6000)
    assert len(list(tmp_path.glob("shard-*"))) == 2
    done = subprocess.run(command(*args, "--tokens", 9000, "--seed", 1), cwd=ROOT, env=ENVIRONMENT, text=True,
                          capture_output=True)
    assert done.returncode == 1 and "other settings" in done.stderr and "'seed': (0, 1)" in done.stderr


def test_exits_without_estimators_take_their_confidence_from_the_head(recipe, tmp_path):
    """Confidence is then the largest softmax probability. A --head-size above the vocabulary is reduced to it."""
    first = [(option, value) for option, value in zip(distill(recipe, tmp_path)[1::2], distill(recipe, tmp_path)[2::2])]
    options = dict(first) | {"--head-size": 16384, "--epochs": 0.2}
    run("training.distill", *(part for option in options.items() for part in option))
    engine, _ = load(str(recipe / "model"), tmp_path)
    assert engine.bank.config.confidence == "softmax" and engine.bank.config.head_size == engine.model.vocab_size
    stats = engine.run([5, 6, 7], DecodeConfig(thresholds=0.0, max_new_tokens=4)).stats
    assert 1 <= stats.tokens <= 4 and stats.routing_share[0] == 1, "at threshold 0 every token leaves at the first exit"


def test_writing_continues_after_a_kill_with_the_same_text(recipe, tmp_path):
    args = ("training.data", "policy", "--model", recipe / "model", "--tokens", 9000, "--batch", 32, "--steps", 96)
    run(*args, "--out", tmp_path / "whole")
    kill_once(tmp_path / "torn" / "shard-00000.safetensors", *args, "--out", tmp_path / "torn")
    run(*args, "--out", tmp_path / "torn")
    files = sorted(p.name for p in (tmp_path / "whole").glob("shard-*.safetensors"))
    assert len(files) == 3
    for name in files:
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("whole", "torn"))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), name
