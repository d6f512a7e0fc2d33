"""The local stack: an object store and Airflow on this machine, and the demo that runs on them."""
