"""The configuration of a run, one file for each group of options."""

from mgrpo.config.answer import AnswerConfig
from mgrpo.config.checkpoint import CheckpointConfig
from mgrpo.config.convert import from_dict, to_dict
from mgrpo.config.data import DataConfig
from mgrpo.config.distributed import DistributedConfig
from mgrpo.config.engine import EngineConfig
from mgrpo.config.eval import EvalConfig
from mgrpo.config.filter import FilterConfig
from mgrpo.config.kernels import KernelsConfig
from mgrpo.config.log import LogConfig
from mgrpo.config.lora import LoraConfig
from mgrpo.config.model import ModelConfig
from mgrpo.config.momentum import MomentumConfig
from mgrpo.config.monitor import MonitorConfig
from mgrpo.config.objective import ObjectiveConfig
from mgrpo.config.optim import OptimConfig
from mgrpo.config.option import HomePath, HomeText, flag
from mgrpo.config.rollout import RolloutConfig
from mgrpo.config.run import Config, stop_problems
from mgrpo.config.vote import VoteConfig
from mgrpo.errors import ConfigError

__all__ = [
    "AnswerConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EngineConfig",
    "EvalConfig",
    "FilterConfig",
    "HomePath",
    "HomeText",
    "KernelsConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "MomentumConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RolloutConfig",
    "VoteConfig",
    "flag",
    "from_dict",
    "stop_problems",
    "to_dict",
]
