"""The local stack and the demo on it: what `make up`, `make down` and `make demo` call.

    python -m scripts.local up | down | status | demo [--reject]
    python -m scripts.local run COMMAND ...    a command that finds the stack's store and Airflow, as
                                               `run python -m tasks models list demo`

Exit codes: 0 as it should be, 1 something failed, 2 this machine is not ready and nothing was started, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
from rich.console import Console

from scripts.demo import DemoError, run_demo, where_to_look
from scripts.preflight import NotReadyError
from scripts.stack import ALL, Stack, StackError
from tasks.errors import StepError


def main() -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the object store and Airflow, and leave them running")
    commands.add_parser("down", help="stop them; the data stays")
    commands.add_parser("status", help="say what runs, and where")
    demo = commands.add_parser("demo", help="run the demo pipeline and show what comes out")
    demo.add_argument("--reject", action="store_true", help="with a harmful setting, to see the gate refuse")
    run = commands.add_parser("run", help="run a command in the stack's environment")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGINT):  # both as Ctrl-C: stop what was started
        signal.signal(number, signal.default_int_handler)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # Airflow's logging would show where the key was found
    console = Console(highlight=False)
    try:
        stack = Stack()
        if arguments.command == "up":
            started = stack.up(console.print)
            console.print("Ready." if started else "Everything runs already.")
            where_to_look(stack, console)
        elif arguments.command == "down":
            stopped = stack.down()
            console.print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")
        elif arguments.command == "run":
            return run_command(stack, arguments.program)
        elif arguments.command == "status":
            running = stack.running()
            for name in ALL:
                console.print(f"{name:14} {'runs' if name in running else 'does not run'}")
            if running:
                where_to_look(stack, console)
        else:
            run_demo(stack, console, reject=arguments.reject)
    except NotReadyError as problem:
        print(problem, file=sys.stderr)
        return 2
    except (StackError, DemoError, StepError, httpx.HTTPError) as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return 0


def run_command(stack: Stack, command: list[str]) -> int:
    """Run a command with the stack's environment and the libraries of `.venv`; returns its exit code."""
    if not stack.running():
        raise StackError("Nothing runs: start it with `make up`.")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.run(command, env={**stack.environment, "PATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
