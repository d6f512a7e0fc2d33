"""What must be there before the containers of docker-compose.yaml start: tables, the UI's password.

Run by the service `init`, every time; what is there already stays.
"""

import json
import os
import subprocess
from pathlib import Path

subprocess.run(["airflow", "db", "migrate"], check=True)
passwords = Path(os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"])
passwords.touch(mode=0o600)
passwords.write_text(json.dumps({"admin": os.environ["AIRFLOW_PASSWORD"]}))
