"""User turns for quick training without prompts of your own: tasks filled with topics, in a random order.

They are plain on purpose: what people ask a chat model first, about everyday things, knowledge and code. The model's
answers to them are training text. No user turn is one of the prompts with which the project measures.
"""

import random

_TASKS = {
    "knowledge": ("What is {}?", "Explain {} to a ten-year-old.", "Explain {} in three sentences.",
                  "Why is {} important?", "How does {} work?", "What are common mistakes people make about {}?",
                  "Write a short paragraph about {}.", "Give me five facts about {}.", "Who first studied {}?",
                  "What should I read to learn more about {}?", "Ask me three quiz questions about {}.",
                  "Summarize the history of {}.", "Is {} dangerous? Answer briefly."),
    "life": ("Give me advice on {}.", "Make a plan for {} in seven steps.", "What do I need for {}?",
             "Write a polite email to a friend about {}.", "Write a poem of four lines about {}.",
             "Tell a short story about {}.", "List the pros and cons of {}.", "How do I begin with {}?",
             "What could go wrong with {}?", "Write a title and an opening line for a blog post on {}.",
             "How much time does {} take?", "Write a dialogue between two people who talk about {}."),
    "code": ("Write a Python function that can {}.", "How would you {} in JavaScript?",
             "Show me a short program in C that can {}.", "Explain step by step how to {} in code.",
             "Write a unit test for a function that should {}.", "What is the fastest way to {}?",
             "Write a shell command to {}.", "Find three edge cases of a function that must {}.",
             "Write a class in Java with a method to {}.", "Write pseudocode to {}."),
}
_TOPICS = {
    "knowledge": (
        "gravity", "the water cycle", "inflation", "a black hole", "the immune system", "democracy", "an eclipse",
        "DNA", "the stock market", "plate tectonics", "the Roman Empire", "an antibiotic", "electricity",
        "climate change", "the internet", "a neural network", "probability", "evolution", "the moon", "a volcano",
        "chess", "jazz", "the printing press", "a battery", "coral reefs", "the Silk Road", "fermentation", "a glacier",
        "prime numbers", "the human heart", "a rainbow", "supply and demand", "sleep", "the periodic table",
        "a computer chip", "an earthquake", "the Renaissance", "honey", "sound", "an electric car", "encryption",
        "the ozone layer"),
    "life": (
        "moving to a new city", "learning the guitar", "cooking dinner for six", "a job interview", "saving money",
        "a birthday party for a child", "growing tomatoes", "running a first marathon", "adopting a cat",
        "a long train journey", "making new friends", "a rainy weekend", "writing a novel", "giving a speech",
        "buying a used bicycle", "a family reunion", "getting up early", "painting a room", "a picnic by the lake",
        "starting a small business", "a camping trip", "cleaning the kitchen", "reading more books",
        "learning to swim as an adult", "a surprise for my sister", "working from home", "baking bread",
        "a visit to a museum", "planning a wedding", "keeping a diary"),
    "code": (
        "reverse a string", "find the largest number in a list", "check whether a number is prime",
        "remove duplicates from a list", "count the words of a file", "sort a list of names", "merge two dictionaries",
        "read a CSV file", "compute the factorial of a number", "find the longest word in a sentence",
        "convert Celsius to Fahrenheit", "validate an email address", "parse a date", "flatten a nested list",
        "compute the Fibonacci numbers", "find common elements of two lists", "download a web page",
        "shuffle a deck of cards", "check for a palindrome", "compute a moving average", "rename many files",
        "group records by a key", "find a path in a maze", "retry a failing request", "count lines of code",
        "generate a random password", "draw a triangle of stars", "convert a number to binary"),
}


def questions(seed: int = 0) -> list[str]:
    """Return all user turns, each once, in an order that the seed decides."""
    turns = [task.format(topic) for kind, tasks in _TASKS.items() for task in tasks for topic in _TOPICS[kind]]
    random.Random(seed).shuffle(turns)
    return turns
