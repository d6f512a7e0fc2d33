"""The work of the retraining pipeline: one module a step, plain Python, no Airflow below this package.

The steps are the modules here: configure, pull, validate, preprocess, train, evaluate, gate, promote, reject, report.
Beside them is what all of them stand on: the run and its settings, the store, and the registry of published models.
What only some of them need is in `data` (corpora, rules, tokenizer), `training`, `judging` (translations and their
scores) and `pages` (what people look at).
"""

import os

# Before any module imports TensorFlow: transformers' TensorFlow models are Keras 2 models.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
