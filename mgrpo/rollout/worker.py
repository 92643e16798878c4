"""vLLM's worker extension (`--worker-extension-cls mgrpo.rollout.worker.WeightReceiver`): updates the weights."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from typing import Any

from safetensors.torch import load


class WeightReceiver:
    """Methods that vLLM adds to its worker, called by name over /collective_rpc with JSON alone."""

    reload_weights: Any  # the worker's method
    model_runner: Any

    def mgrpo_load(self, url: str, sha256: str, version: str) -> dict[str, Any]:
        """Fetches a safetensors file, checks it, and writes every tensor into the model."""
        self.mgrpo_version = None
        with urllib.request.urlopen(url, timeout=600) as reply:
            data = reply.read()
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise ValueError(f"mgrpo_load: weights must have SHA-256 {sha256}, got {found}.")
        weights = load(data)
        self.reload_weights(weights_iterator=iter(weights.items()))
        self.mgrpo_version = version
        return {"tensors": len(weights), "bytes": len(data)}

    def mgrpo_name(self, version: str) -> None:
        """Sets the version of weights that were sent by NCCL; "" while they are being sent."""
        self.mgrpo_version = version or None

    def mgrpo_state(self) -> dict[str, Any]:
        """Version of the weights, None after a start or a failed update, and the process id."""
        return {"version": getattr(self, "mgrpo_version", None), "pid": os.getpid()}
