"""What Airflow lacks: the operators that run a step."""
