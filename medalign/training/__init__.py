"""The training loop: trainer, step, schedule, callbacks."""
