"""miles-spec: a rollout accelerator for reinforcement learning of language models.

Importing this package loads neither torch, ray nor sglang.
"""

__version__ = "0.1.0"
