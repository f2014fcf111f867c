"""From data to weights: training, further training and exact resumption of transformers models.

`train(TrainConfig(...), listen)` runs; everything it says is an event. Called by the command line and by scripts.
"""

from hasten.train.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from hasten.train.events import Evaluated, Event, Finished, Saved, Started, Stepped, Warned
from hasten.train.loop import train

__all__ = [
    "DataConfig",
    "Evaluated",
    "Event",
    "Finished",
    "OptimizerConfig",
    "Saved",
    "ScheduleConfig",
    "Started",
    "Stepped",
    "TrainConfig",
    "Warned",
    "train",
]
