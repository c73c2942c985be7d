"""Prompts as chat token ids."""


def chat_ids(tokenizer, prompt: str) -> list[int]:
    """One user turn in the model's chat template, ready for the reply; plain text for models that have none."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
