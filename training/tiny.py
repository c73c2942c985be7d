"""Make a tiny random Llama with its own tokenizer and chat template, to try the training commands.

    python -m training.tiny --out runs/tiny

The tokenizer is trained on `training/smoke_text.txt`, a text that was written for this purpose.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = Path(__file__).parent / "smoke_text.txt"
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def make_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `text`. Returns a tokenizer in which `<s>` is token 0 and `</s>` is token 1.

    It has at most `vocab_size` tokens, and a chat template.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(vocab_size: int, layers: int, hidden: int) -> LlamaForCausalLM:
    """Make a random Llama in bf16. Its weights are larger than usual, so that its choices depend on the text."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True))
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.15)
    return model.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--vocab", type=int, default=384, help="tokens of the vocabulary")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()

    tokenizer = make_tokenizer(TEXT.read_text(encoding="utf-8"), args.vocab)
    torch.manual_seed(args.seed)
    model = make_model(len(tokenizer), args.layers, args.hidden)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
