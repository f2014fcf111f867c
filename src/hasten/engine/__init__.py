"""From a request to its tokens: loading a checkpoint, running a model, choosing tokens, streaming their text."""

from hasten.engine.checkpoint import Checkpoint, load
from hasten.engine.generate import Finished, Token, generate
from hasten.engine.runner import Runner, step_threads
from hasten.engine.sampling import Sampling

__all__ = ["Checkpoint", "Finished", "Runner", "Sampling", "Token", "generate", "load", "step_threads"]
