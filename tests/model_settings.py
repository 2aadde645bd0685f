"""How the tests' models are computed where nothing else is said."""

import jax.numpy as jnp

from cpt_jax.model import transformer

FLOAT32 = transformer.Settings(jnp.dtype("float32"), remat="none", attention="auto", loss_chunk=0, max_documents=None, scan=True)
PLAIN = FLOAT32._replace(attention="plain")  # all scores at once, independent of the kernels
