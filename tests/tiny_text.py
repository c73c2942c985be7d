"""A tokenizer of 97 tokens for the tiny random models: letters, parts of an emoji, hostile text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HOSTILE = ("<img src=x onerror=alert(1)>", "${alert(1)}", "\\usepackage{x}",
           "</script><script>alert(1)</script>", "\u202eabc", "{{value}}", "`${'", '"&lt;"')
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_EMOJI_BYTES = "ðŁĺĢ"               # the four bytes of 😀, as byte-level tokenizers write them
_EURO_BYTES = "âĤ¬"                 # the three bytes of €
_WORDS = ["<s>", "</s>", *_LETTERS, "Ġ", "Ċ", *_EMOJI_BYTES, *_EURO_BYTES, *"0123456789", *".,!?",
          *"ABCDEFGHIJKL", *(f"Ġ{letter}" for letter in _LETTERS)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(_WORDS)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens([AddedToken(text, normalized=False) for text in HOSTILE])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer
