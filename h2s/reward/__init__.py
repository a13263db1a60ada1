"""A reward model that learns judgements."""
