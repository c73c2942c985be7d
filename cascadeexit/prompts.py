"""Prompts: reads sets of prompts that are bundled, pasted or uploaded, and converts prompts to token ids.

Pasted text and files are not trusted. They are read within limits. If one is refused, the error says why.
"""

import csv
import io
import json
import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascadeexit.folders import assets_folder
from cascadeexit.values import first_line, shown

MAX_BYTES = 1_000_000               # of a file or of pasted text
MAX_PROMPTS = 200
MAX_CHARACTERS = 4_000              # of one prompt of a set
MAX_KIND_CHARACTERS = 40
MAX_PROMPT_CHARACTERS = 20_000      # of a prompt that is written by hand
OWN = "own"                         # kind of a prompt without one

_PROMPTS_FILE = assets_folder() / "prompts.json"
_PROMPT_FIELDS = ("prompt", "text", "instruction")      # of a JSON row: the first that is present
_KIND_FIELDS = ("kind", "set")
# Not str.splitlines: it also cuts at U+2028 and similar characters, which may stand inside a prompt or a JSON string.
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Prompt:
    """A prompt and its kind. A kind is a word such as a topic; results of an evaluation are grouped by it."""

    kind: str
    text: str


def read_prompts(source: str | Path, limit: int = MAX_PROMPTS) -> list[Prompt]:
    """Read prompts from pasted text (a str, never taken for a path) or from a UTF-8 file (a Path).

    Args:
        source: pasted text holds one prompt per line, or one JSON object per line as in .jsonl. The ending of a file's
            name decides how the file is read. .txt: one prompt per line. .jsonl: one object per line with "prompt",
            "text" or "instruction", and optional "kind" or "set". .csv: a header with the column `prompt`, and optional
            `kind` or `set`.
        limit: largest number of prompts.

    Raises ValueError. The message names the line, what was expected, what was found, and what to do. It may quote the
    source, so escape it before it is shown as HTML.
    """
    read = _reader_of(source) if isinstance(source, Path) else _from_pasted
    content = _file_text(source) if isinstance(source, Path) else source.removeprefix("\ufeff")
    _check_size(len(content.encode("utf-8", "surrogatepass")))
    nul = content.find("\0")
    if nul >= 0:
        raise ValueError(f"line {_line_at(content, nul)}: expected text, got a NUL character: save the prompts as "
                         "plain UTF-8 text")
    prompts = []
    for line, prompt in read(content):
        _check_prompt(prompt, line)
        if len(prompts) == limit:
            raise ValueError(f"line {line}: expected at most {limit} prompts, got more: leave some out")
        prompts.append(prompt)
    if not prompts:
        raise ValueError("expected at least one prompt, got none: write one per line")
    return prompts


def token_ids(tokenizer, text: str, *, chat: bool = True) -> list[int]:
    """Convert a prompt to token ids, as one user turn in the chat template of the model.

    The ids end where the reply begins. If the tokenizer has no template, or with chat=False, the plain text is
    converted without a template.
    """
    if not (chat and tokenizer.chat_template):
        return tokenizer(text)["input_ids"]
    return conversation_ids(tokenizer, [{"role": "user", "content": text}])


def conversation_ids(tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Convert a conversation to token ids with the chat template of the model. The ids end where the reply begins.

    messages: the turns so far, [{role, content}]; a role is "system", "user" or "assistant".

    Raises ValueError if the template refuses these turns, or is wrong. The tokenizer must have a template.
    """
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:      # a template is a program: it raises errors of many kinds
        raise ValueError(f"the chat template of this model cannot write these turns ({first_line(error)})") from error


def visitor_token_ids(tokenizer, prompt: str | None, chat: bool) -> list[int]:
    """Convert a visitor's prompt to token ids, as `token_ids` does.

    Raises ValueError with a message for the visitor if the prompt is not text, is empty, or is too long.
    """
    if not isinstance(prompt or "", str):
        raise ValueError(f"The prompt should be text, got {shown(prompt)}.")
    prompt = (prompt or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # no lone surrogates
    if not prompt.strip():
        raise ValueError("Please write a prompt first.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"This prompt has {len(prompt):,} characters; the limit is {MAX_PROMPT_CHARACTERS:,}.")
    return token_ids(tokenizer, prompt, chat=chat)


def opening_ids(tokenizer) -> list[int]:
    """Return the token ids that the chat template puts before the user's words; [] if there is no template."""
    return os.path.commonprefix([token_ids(tokenizer, text) for text in ("a", "1")]) if tokenizer.chat_template else []


def bundled_prompts(kinds: Sequence[str] | None = None, each: int | None = None) -> list[Prompt]:
    """Return the bundled prompts. The kinds alternate, so that the first n prompts are balanced.

    Args:
        kinds: kinds to return; None for all kinds, in the order of the file.
        each: largest number of prompts of one kind; None for no limit.

    Raises ValueError for a kind that does not exist.
    """
    content = json.loads(_PROMPTS_FILE.read_text(encoding="utf-8"))
    unknown = [kind for kind in kinds or () if kind not in content]
    if unknown:
        raise ValueError(f"no bundled prompts of kind {shown(unknown[0])}; the kinds are {', '.join(content)}")
    chosen = {kind: content[kind][:each] for kind in (content if kinds is None else kinds)}
    longest = max(map(len, chosen.values()), default=0)
    return [Prompt(kind, texts[i]) for i in range(longest) for kind, texts in chosen.items() if i < len(texts)]


def _from_pasted(content: str) -> Iterator[tuple[int, Prompt]]:
    try:
        rows = all(isinstance(json.loads(line), dict) for _, line in _lines(content))
    except (ValueError, RecursionError):
        rows = False
    return _from_jsonl(content) if rows else _from_text(content)


def _from_text(content: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in _lines(content):
        yield number, Prompt(OWN, line.strip())


def _from_jsonl(content: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in _lines(content):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f'line {number}: expected a JSON object such as {{"prompt": "..."}}, got {shown(line)}: '
                             "correct the line, or name the file .txt if it holds plain prompts")
        yield number, _from_row(row, _PROMPT_FIELDS, number)


def _from_csv(content: str) -> Iterator[tuple[int, Prompt]]:
    table = csv.reader(io.StringIO(content, newline=""), strict=True)
    header = []
    while True:
        line = table.line_num + 1                   # first line of the next row: cells may hold line ends
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise ValueError(f"line {line}: expected comma-separated cells, got a row that breaks off ({error}): "
                             "close every quote, and double the quotes inside a cell") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip().lower() for cell in cells]
            if header.count("prompt") != 1:
                raise ValueError(f"line {line}: expected a header with one column named prompt, got "
                                 f"{shown(','.join(cells))}: name it prompt, and put commas between columns")
        elif any(cell.strip() for cell in cells[len(header):]):
            # Usually a comma inside a prompt: the rest of the prompt would be lost silently.
            raise ValueError(f"line {line}: expected one cell per column, {len(header)} in all, got {len(cells)}: "
                             'put prompts with commas in quotes, "like, this"')
        else:
            yield line, _from_row(dict(zip(header, cells)), ("prompt",), line)


def _from_row(row: dict, names: Sequence[str], line: int) -> Prompt:
    """Make a prompt from a JSON object or from a row of a table.

    The text of the prompt is the first field of `names` that is present. Raises ValueError if there is no text.

    line: number of the line in the source, for error messages.
    """
    text, kind = (next((row[name] for name in known if row.get(name) is not None), None)
                  for known in (names, _KIND_FIELDS))
    if not isinstance(text, str) or not text.strip():
        got = "none" if text is None else shown(text)
        raise ValueError(f"line {line}: expected a text under {' or '.join(names)}, got {got}: "
                         "write the prompt, or leave the line out")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"line {line}: expected a word as the prompt's kind, got {shown(kind)}: put it in quotes")
    return Prompt((kind or "").strip() or OWN, text)


def _reader_of(path: Path) -> Callable[[str], Iterator[tuple[int, Prompt]]]:
    readers = {".txt": _from_text, ".jsonl": _from_jsonl, ".csv": _from_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"expected a file name that ends in {' or '.join(readers)}, got {shown(path.name)}: "
                         "save the prompts in one of these formats")
    return readers[path.suffix.lower()]


def _file_text(path: Path) -> str:
    try:
        if not path.is_file():                      # reading a pipe or a device might never end
            raise ValueError(f"expected a file, got {shown(path.name)}, which is not a file: choose another")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        _check_size(path.stat().st_size if len(content) > MAX_BYTES else 0)
    except OSError as error:
        raise ValueError(f"expected a file that can be read, got {shown(path.name)} ({error.strerror}): "
                         "choose another") from None
    try:
        return content.decode("utf-8-sig")          # spreadsheet programs write a byte order mark
    except UnicodeDecodeError as error:
        line = _line_at(content[:error.start].decode("latin-1"), error.start)
        raise ValueError(f"line {line}: expected UTF-8 text, got the byte 0x{error.object[error.start]:02x}: save the "
                         "file as UTF-8") from None


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes, got {size:,}: split the prompts into smaller sets")


def _check_prompt(prompt: Prompt, line: int) -> None:
    for field, text, most in (("prompt", prompt.text, MAX_CHARACTERS), ("kind", prompt.kind, MAX_KIND_CHARACTERS)):
        if len(text) > most:
            raise ValueError(f"line {line}: expected a {field} of at most {most:,} characters, got {len(text):,}: "
                             "shorten it")
        # JSON can hold both as escapes; tokenizers and files cannot.
        bad = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if bad:
            raise ValueError(f"line {line}: expected a {field} of whole characters, got {bad!r}: remove it")


def _lines(content: str) -> Iterator[tuple[int, str]]:
    """Return (number, line) for each line that is not blank. Numbers begin at 1 and count blank lines, too."""
    return ((number, line) for number, line in enumerate(_LINE_END.split(content), 1) if line.strip())


def _line_at(content: str, position: int) -> int:
    """Return the number, from 1, of the line that holds the character at this position."""
    return 1 + len(_LINE_END.findall(content[:position]))
