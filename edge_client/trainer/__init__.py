"""Local fine-tuning: what a trainer is (`base`), the torch one, and the process it runs in."""
