"""GGUF files: converted once to the same model, and every bad file is refused with the reason."""

import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub.errors import RepositoryNotFoundError

from cascadeexit import conversion, gguf_file, hub
from cascadeexit.config import DecodeConfig
from cascadeexit.conversion import ModelUnavailable
from tests.tiny_models import SHAPE, tiny_base

LETTERS = [chr(i) for i in range(ord("!"), ord("!") + 90)]


def write_gguf(path, kind="llama"):
    """A tiny random model in fp32, with a tokenizer of single characters and a chat template."""
    base, writer = tiny_base("llama-untied"), GGUFWriter(path, kind)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(base.config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(SHAPE["vocab_size"])
    words = ["<s>", "</s>", "ab", *LETTERS, *(f"<{i}>" for i in range(SHAPE["vocab_size"] - 3 - len(LETTERS)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, *[1] * (len(words) - 2)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for message in messages %}<s>{{ message['content'] }}{% endfor %}")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk"}
    heads = {"q_proj": SHAPE["num_attention_heads"], "k_proj": SHAPE["num_key_value_heads"]}
    for name, weight in base.state_dict().items():
        for part, count in heads.items():
            if part in name:            # llama.cpp rotates neighbours, transformers rotates halves
                weight = weight.view(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-Model.GGUF")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CASCADEEXIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_the_same_model_and_is_converted_once(made, cache, monkeypatch):
    lines, shape = [], hub.describe(str(made))
    assert not cache.exists(), "describing a model converts nothing"
    engine, tokenizer = hub.load(str(made), device="cpu", dtype="float32", progress=lines.append, measure=False)
    assert engine.model.name == shape.name == "tiny-model" and shape.num_layers == engine.model.num_layers
    assert lines[0].startswith("Converting Tiny-Model.GGUF") and "chat_template" in vars(tokenizer)
    base = tiny_base("llama-untied", dtype=torch.bfloat16).float()
    ids = [5, 6, 7, 9]
    with torch.inference_mode():
        expected = base.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):].tolist()
    assert engine.run(ids, DecodeConfig(mode="full", max_new_tokens=12)).token_ids == expected
    monkeypatch.setattr(gguf_file, "convert", None)
    assert hub.load_model(str(made), device="cpu")[2] == "tiny-model"
    assert not list(cache.rglob("*.tmp-*"))


def test_a_file_that_is_cut_off_or_no_gguf_is_refused(made, cache, tmp_path):
    text, cut = tmp_path / "text.gguf", tmp_path / "cut.gguf"
    text.write_text("GGML")
    cut.write_bytes(made.read_bytes()[:-5000])
    for path, words in ((text, "is not a GGUF file"), (cut, "damaged or cut off"),
                        (tmp_path / "none.gguf", "there is no file")):
        with pytest.raises(ModelUnavailable, match=words):
            hub.load_model(str(path), device="cpu")
    assert not list(tmp_path.rglob("model.safetensors"))


def test_another_architecture_is_refused_by_name(cache, tmp_path):
    with pytest.raises(ValueError, match="type 'mamba', which is not supported.*llama"):
        hub.load_model(str(write_gguf(tmp_path / "m.gguf", "mamba")), device="cpu")


def test_a_conversion_that_fails_or_is_killed_leaves_nothing(made, cache, monkeypatch):
    def broken(gguf, folder):
        folder.mkdir()
        raise KeyError("blk.0.odd")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "convert", broken)
        with pytest.raises(ModelUnavailable, match="could not be converted.*blk.0.odd"):
            hub.load_model(str(made), device="cpu")
        patch.setattr(conversion.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(ModelUnavailable, match="too full"):
            hub.load_model(str(made), device="cpu")
    assert not [p for p in cache.rglob("*") if p.is_dir() and "tiny-model" in p.name]


def test_a_file_on_the_hub(made, cache, monkeypatch):
    asked = []

    def download(repository, name, token):
        asked.append((repository, name, token))
        return str(made)

    monkeypatch.setattr(gguf_file, "hf_hub_download", download)
    assert hub.load_model("owner/name:Tiny-Model.GGUF", device="cpu", token="secret")[2] == "tiny-model"
    assert set(asked) == {("owner/name", "Tiny-Model.GGUF", "secret")}

    def missing(*args, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(gguf_file, "hf_hub_download", missing)
    with pytest.raises(ModelUnavailable, match="there is no model 'owner/other:x.gguf'"):
        hub.load_model("owner/other:x.gguf", device="cpu")
