"""The mathematics of rectified flow. Knows no network."""
