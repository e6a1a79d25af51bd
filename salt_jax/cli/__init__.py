"""The programs: one file a command, and what they share. No jax before all that can be refused."""
