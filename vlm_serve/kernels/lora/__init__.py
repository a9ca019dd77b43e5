"""Low-rank updates (LoRA) by token."""
