"""TextDecoder: turns token ids into text, one token at a time."""

import re

BROKEN = "\ufffd"           # how decoders show an incomplete or invalid UTF-8 sequence


class TextDecoder:
    """Decodes token ids to text, one token at a time.

    The pieces that `push` and `flush` return, joined, are the text that the tokenizer decodes from all tokens at once.
    A token that ends inside a character gives "". The token that completes the character gives the character. One
    exception: tokenizers with byte fallback change a character if invalid bytes follow it, and a piece that was already
    returned is not corrected.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []   # last complete tokens: decoders treat the first token of a text differently
        self._held: list[int] = []      # tokens of an incomplete character

    @property
    def holding(self) -> bool:
        """True while the tokens so far end inside a character."""
        return bool(self._held)

    def push(self, token_id: int) -> str:
        """Decode the next token. Returns the text that the token adds; "" if the token ends inside a character."""
        # Lists are replaced, never changed in place: a shallow copy of a decoder can decode drafts.
        self._held = [*self._held, token_id]
        piece = self._pending()
        if piece.endswith(BROKEN):
            return ""
        self._context, self._held = self._held, []
        return piece

    def flush(self) -> str:
        """End the text. Returns what the tokenizer shows for an incomplete last character; "" if there is none.

        The incomplete character is usually shown as U+FFFD. Call `flush` once, after the last token: it drops the
        tokens of this character.
        """
        piece, self._held = self._pending() if self._held else "", []
        return piece

    def _pending(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)):]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Byte-level tokenizers write a byte as one character: printable Latin-1 as itself, others from U+0100 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - {*_PLAIN}))}


def token_bytes(tokenizer, token_id: int) -> bytes:
    """Return the UTF-8 bytes that a token stands for. This also works for a token that is only part of a character.

    tokenizer: a transformers tokenizer.
    """
    word = tokenizer.convert_ids_to_tokens(token_id)
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", word):                # byte fallback
        return bytes.fromhex(word[3:5])
    if BROKEN in tokenizer.decode([token_id]) and set(word) <= set(_BYTES):
        return bytes(_BYTES[c] for c in word)
    return tokenizer.decode([token_id]).encode("utf-8", "replace")
