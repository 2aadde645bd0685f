"""The model: its shape, its parameters and what is computed with them. Letters of dimensions: cpt_jax/stream/batch.py."""
