"""Examples: the prompts that the page offers, as {text of the button: prompt}. The page opens with the first one.

They were chosen by measurement (`python -m training.defaults`). The full model answers each of them without falling
into a loop. The mode `cascade` at the page's default setting does not fall into a loop, either, and every exit writes
some of its tokens. Other prompts may do worse.
"""

EXAMPLES = {
    "Why is the sky blue?": "Explain why the sky is blue.",
    "Reverse a string": "Write a Python function that reverses a string.",
    "Photosynthesis": "What is photosynthesis?",
    "Three language tips": "Give me three tips for learning a new language.",
    "A lighthouse story": "Tell me a story about a lighthouse keeper and a lost bird.",
    "Déjà vu (français)": "Explain the French phrase déjà vu.",
    "Good morning 😀": "Good morning! 😀 How can I start the day well?",
}
