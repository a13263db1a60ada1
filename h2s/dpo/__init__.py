"""DPO on the prefix."""
