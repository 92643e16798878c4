"""Rollout engines behind one protocol."""

from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.rollout.engine import Engine
from mgrpo.types import Rollouts, Sampling

__all__ = ["Engine", "EngineError", "Rollouts", "Sampling", "StaleWeightsError"]
