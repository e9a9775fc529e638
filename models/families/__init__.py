"""One file a family: its sizes, its config.json, its tensors' names, its presets. No jax. `moejax.models.config` lists them."""
