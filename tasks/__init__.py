"""The work of the retraining pipeline: one module a step, plain Python, no Airflow below this package."""

__version__ = "0.1.0"
