"""`python -m sleep_jax`: the same as the command `sleep-jax`."""

from sleep_jax import cli

if __name__ == '__main__':
  cli.run()
