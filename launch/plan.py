"""python -m launch.plan: the program is in salt_jax/cli/plan.py."""

from salt_jax.cli import plan

if __name__ == "__main__":
    plan.run()
