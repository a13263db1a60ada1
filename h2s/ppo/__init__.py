"""Single-step PPO on the prefix."""
