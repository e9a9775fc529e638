"""From records to batches: sources, templates, tokens, packed or padded rows. No jax here."""
