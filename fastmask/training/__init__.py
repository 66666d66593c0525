"""Training: which sentences, which steps, which checkpoints; the same run again from the same seed."""
