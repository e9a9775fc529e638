"""moejax: fine-tune Mixture-of-Experts models on one GPU, in JAX. Importing this imports no jax."""

__version__ = "0.1.0"
