"""M-GRPO in stock TRL: MGRPOTrainer and its MGRPOConfig."""

from mgrpo.integrations.trl.config import MGRPOConfig
from mgrpo.integrations.trl.trainer import MGRPOTrainer

__all__ = ["MGRPOConfig", "MGRPOTrainer"]
