"""Retraining of derived networks."""

from rfdarts_fast.retrain.config import RECIPES, TrainConfig
from rfdarts_fast.retrain.run import evaluate_run, train

__all__ = ["RECIPES", "TrainConfig", "evaluate_run", "train"]
