"""python -m launch.serve: the program is in salt_jax/cli/serve.py."""

from salt_jax.cli import serve

if __name__ == "__main__":
    serve.run()
