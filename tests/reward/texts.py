"""What the tests of rewards score: contexts and responses of unlike lengths."""

from tiny import sample_context

CONTEXTS = [sample_context(i) for i in range(9)]
RESPONSES = [
    "how was the walk?",
    "i like tea.",
    "a",
    "song " * 30,
    "?",
    "I ran and ran.",
    "rain",
    "cat film",
    "trip. " * 7,
]
