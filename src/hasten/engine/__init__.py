"""From a request to its tokens: loading a checkpoint, running a model, choosing tokens, streaming their text."""

from hasten.engine.checkpoint import Checkpoint, load
from hasten.engine.engine import Engine, Handle, Stats
from hasten.engine.events import Failed, Finished, Logprobs, Token
from hasten.engine.generate import generate
from hasten.engine.runner import Runner, step_threads
from hasten.engine.sampling import Sampling

__all__ = [
    "Checkpoint",
    "Engine",
    "Failed",
    "Finished",
    "Handle",
    "Logprobs",
    "Runner",
    "Sampling",
    "Stats",
    "Token",
    "generate",
    "load",
    "step_threads",
]
