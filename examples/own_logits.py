"""Fuse logits of your own source, such as the last row of `model(ids).logits` of Transformers.

Here three random models of 1,000 tokens stand in for it. Each row has to be an array of float32.
"""

import numpy as np

from edge_dlf import fuse_logits, search_alpha

random = np.random.default_rng(0)
base = random.normal(size=1000).astype(np.float32)
large = base + random.normal(scale=2, size=1000).astype(np.float32)
expert = base.copy()
expert[42] += 9  # what fine-tuning has taught

choice = search_alpha(large, base, expert[None])
fused = fuse_logits(large, base, expert[None], [choice.alpha])
print(f"α = {choice.alpha:.1f}; the large model picks {large.argmax()}, the fusion {fused.argmax()}")
