"""Salt in JAX: distil video diffusion transformers into students of 2-8 network evaluations.

Read in this order: `types`, `flow`, `models.wan`, `rollout.parallel`, `losses`, `train.step`.
"""

__version__ = "0.1.0"
