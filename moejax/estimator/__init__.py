"""What fits, how fast, how many dollars, on which GPU. numpy alone at import; scipy and matplotlib where they are used; no jax."""
