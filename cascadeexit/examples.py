"""Examples: the prompts that the page offers, as {text of the button: prompt}. The page opens with the first one.

The full model answers each example without falling into a loop. `python -m training.defaults` measures this.
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
