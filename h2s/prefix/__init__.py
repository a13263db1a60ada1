"""A hard prompt as a PEFT prefix, and answers with it."""
