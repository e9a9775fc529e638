"""Checkpoints in and out: Hub safetensors, PEFT adapters."""
