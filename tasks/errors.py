"""The ways a step can fail, told apart by exit code so that an orchestrator knows what to do about each.

They are those of `retrain_models`, which reads the store for steps and services alike.
"""

from retrain_models.errors import DataError, RetryableError, SettingsError, StepError

__all__ = ["NEVER_RETRY", "DataError", "RetryableError", "SettingsError", "StepError"]

NEVER_RETRY = frozenset({SettingsError.exit_code, DataError.exit_code, 2})  # 2: argparse refused the command line
