"""Rollout engines behind one protocol."""

from mgrpo.rollout.engine import Engine, EngineError, Rollouts, Sampling, StaleWeightsError

__all__ = ["Engine", "EngineError", "Rollouts", "Sampling", "StaleWeightsError"]
