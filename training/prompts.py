"""The project's own prompts (assets/prompts.json), as chat token ids."""

import json
from pathlib import Path

PROMPTS_FILE = Path(__file__).parents[1] / "assets" / "prompts.json"


def load_prompts(sets: list[str] | None = None, count: int | None = None) -> list[tuple[str, str]]:
    """(set, prompt) pairs, the sets taken in turn, so that any first `count` of them are balanced.

    Raises ValueError for a set that does not exist.
    """
    content = json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))
    unknown = set(sets or ()) - set(content)
    if unknown:
        raise ValueError(f"no prompt set {', '.join(sorted(unknown))}; there are {', '.join(content)}")
    chosen = {name: content[name] for name in sets or content}
    longest = max(map(len, chosen.values()))
    pairs = [(name, texts[i]) for i in range(longest) for name, texts in chosen.items() if i < len(texts)]
    return pairs[:count]


def chat_ids(tokenizer, prompt: str) -> list[int]:
    """One user turn in the model's chat template, ready for the reply; plain text for models that have none."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
