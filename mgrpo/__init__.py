"""M-GRPO: label-free reinforcement learning with a momentum anchor."""

__version__ = "0.1.0"
