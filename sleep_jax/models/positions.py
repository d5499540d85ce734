"""sleep_jax.models.positions."""

PAD_POSITION = -1  # A cache entry or token that nobody may attend to.
