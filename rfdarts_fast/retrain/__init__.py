"""Retraining of derived networks."""

from rfdarts_fast.retrain.config import PRESETS, TrainConfig
from rfdarts_fast.retrain.run import evaluate_run, train

__all__ = ["PRESETS", "TrainConfig", "evaluate_run", "train"]
