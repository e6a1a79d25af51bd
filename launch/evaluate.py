"""python -m launch.evaluate: the program is in salt_jax/cli/evaluate.py."""

from salt_jax.cli import evaluate

if __name__ == "__main__":
    evaluate.run()
