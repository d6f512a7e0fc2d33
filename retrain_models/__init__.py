"""The models that retrain publishes, for whoever uses them: pull one, and hear when production moves.

    import retrain_models

    pulled = retrain_models.pull("en-es", "production", "model")   # ./model, every file verified
    for version in retrain_models.watch("en-es"):                  # now, and whenever production moves
        ...

It needs boto3 and nothing else. The store is found by `S3_ENDPOINT_URL` and the usual AWS chain, the bucket by
`RETRAIN_BUCKET`. The steps of retrain read models by this very code. README.md beside this file shows the layout in the
store, for services in other languages.
"""

from retrain_models.artifacts import File, Manifest
from retrain_models.errors import (
    ConflictError,
    DataError,
    MissingObjectError,
    RetryableError,
    SettingsError,
    StepError,
    StoreRefusedError,
    StoreUnreachableError,
)
from retrain_models.registry import PRODUCTION, Event, Pointer
from retrain_models.service import Pulled, pull, watch
from retrain_models.storage import Bucket

__all__ = [
    "PRODUCTION",
    "Bucket",
    "ConflictError",
    "DataError",
    "Event",
    "File",
    "Manifest",
    "MissingObjectError",
    "Pointer",
    "Pulled",
    "RetryableError",
    "SettingsError",
    "StepError",
    "StoreRefusedError",
    "StoreUnreachableError",
    "pull",
    "watch",
]
