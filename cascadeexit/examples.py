"""Examples: the prompts that the page offers, as {text of the button: prompt}. The page opens with the first one.

They were chosen by measurement (`python -m training.defaults`). The full model answers each of them without falling
into a loop. At the page's default setting, the cascade does not loop either, and every exit writes some of the tokens.
Other prompts may do worse.
"""

EXAMPLES = {
    "Why is the sky blue?": "Explain why the sky is blue.",
    "Count the vowels": "Write a Python function that counts the vowels in a string.",
    "Photosynthesis": "What is photosynthesis?",
    "Three language tips": "Give me three tips for learning a new language.",
    "A garden story": "Write a story about a girl and her garden.",
    "Déjà vu (français)": "Explain the French phrase déjà vu.",
    "Good morning 😀": "Good morning! 😀 How can I start the day well?",
}
