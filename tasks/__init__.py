"""The work of the retraining pipeline: one module a step, plain Python, no Airflow below this package."""

import os

# Before any module imports TensorFlow: transformers' TensorFlow models are Keras 2 models.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
