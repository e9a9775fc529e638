"""The training loop: model, step, optimizer, metrics, checkpoints."""
