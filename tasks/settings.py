"""Every setting of a pipeline, in one place.

A file in `config/` is checked against `Settings`; so are the overrides of a triggered run. The same model gives the
Airflow trigger form (`form_fields`), so the form, the file and the checks cannot drift apart. A setting's name is its
path in the file: `training.epochs`.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from croniter import CroniterBadDateError, croniter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from tasks.errors import SettingsError

Fraction = Annotated[float, Field(ge=0, le=1)]
EXPERT: dict[str, Any] = {"expert": True}  # in the file and on the command line, but not in Airflow's form

# What a preset changes in a pipeline's file; what is set for the run itself goes before both.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {
        "data.max_train_rows": 2000,
        "data.max_eval_rows": 200,
        "validation.min_train_rows": 100,
        "validation.min_eval_rows": 20,
        "training.epochs": 1,
    },
}
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
# The rules about sentence pairs; what each is about is in tasks/data/rules.py, which is too much to import here.
RuleName = Literal[
    "blank", "too_long", "ratio", "identical", "markup", "mojibake", "damaged", "language", "duplicate", "leaked",
    "nearly_leaked", "not_composed", "entity",
]  # fmt: skip


class Section(BaseModel):
    """A group of settings. Unknown names are refused, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        # Else `min_gain: false` would be the number 0, which asks for a gain.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is no switch: true and false mean nothing here")
        return value


class Data(Section):
    """Where the sentence pairs come from."""

    source: str = Field(
        min_length=1, description="Hub dataset (owner/name), local directory in the hub's layout, or s3:// mirror"
    )
    revision: str | None = Field(
        None, description="Hub only: the commit to pull. Pinned, so that a run can be repeated"
    )
    pair: str = Field("en-es", pattern=r"^[a-z]{2,3}-[a-z]{2,3}$", description="Languages as SOURCE-TARGET")
    licence: str = Field(
        "unknown", min_length=1, description="The corpus's licence, for the model card", json_schema_extra=EXPERT
    )
    max_train_rows: int | None = Field(None, ge=1, description="Use at most this many training pairs")
    max_eval_rows: int | None = Field(None, ge=1, description="Use at most this many validation, and test, pairs")

    @property
    def name(self) -> str:
        """The corpus's name in the object store: the last part of its source."""
        return slug(self.source.rstrip("/").rsplit("/", 1)[-1])

    @property
    def languages(self) -> tuple[str, str]:
        """Source and target language."""
        source, target = self.pair.split("-")
        return source, target

    @property
    def configuration(self) -> str:
        """The pair as the hub names it: by its languages in alphabetical order."""
        return "-".join(sorted(self.languages))


class BaseModelSource(Section):
    """The pretrained model that every run starts from."""

    source: str = Field(min_length=1, description="Hub model (owner/name), local directory, or s3:// mirror")
    revision: str | None = Field(
        None, description="Hub only: the commit to pull. Pinned, so that a run can be repeated"
    )
    licence: str = Field(
        "unknown", min_length=1, description="The model's licence, for the model card", json_schema_extra=EXPERT
    )

    @property
    def name(self) -> str:
        """The model's name in the object store."""
        return slug(self.source.rstrip("/").rsplit("/", 1)[-1])


class Validation(Section):
    """What the data must be like before anything is trained on it."""

    min_train_rows: int = Field(1000, ge=1, description="Fewest usable training pairs")
    min_eval_rows: int = Field(100, ge=1, description="Fewest usable validation, and test, pairs")
    max_characters: int = Field(2000, ge=1, description="Longest sentence, in characters")
    max_length_ratio: float = Field(
        6,
        ge=1,
        description="Longest side over shortest side in characters, both plus ten so that short ones may differ",
    )
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of common words from which a training pair is nearly one that judges the model"
    )
    mostly: Fraction = Field(0.95, description="Smallest share of a split's pairs that must be without each fault")
    mostly_by_rule: dict[RuleName, Fraction] = Field(
        {}, description="The same for single faults, as RULE: SHARE", json_schema_extra=EXPERT
    )
    max_quarantine: Fraction = Field(0.1, description="Largest share of a split's pairs that may be set aside")
    max_conflicting: Fraction = Field(
        0.5, description="Largest share of a split's pairs whose source also has another translation"
    )
    max_unknown_rate: Fraction = Field(
        0.01, description="Largest share of target tokens that the tokenizer cannot express"
    )
    max_row_change: float | None = Field(
        None, ge=0, description="How far the number of training pairs may be from production's, relative to the smaller"
    )
    max_length_drift: Fraction | None = Field(
        None, description="How far the lengths may be from production's (Kolmogorov-Smirnov distance)"
    )
    max_language_drift: Fraction | None = Field(
        None, description="How far the mix of languages may be from production's (share of sentences)"
    )
    max_trigram_drift: Fraction | None = Field(
        None, description="How far the text may be from production's (Jensen-Shannon distance of its letter trigrams)"
    )

    @property
    def drift_limits(self) -> dict[str, float | None]:
        """The limit for each of `tasks.data.drift.MEASURES`."""
        return {
            "rows": self.max_row_change,
            "lengths": self.max_length_drift,
            "languages": self.max_language_drift,
            "trigrams": self.max_trigram_drift,
        }


class Preprocessing(Section):
    """How sentences become token ids."""

    prompt: str = Field(description="Put in front of every source sentence")
    max_tokens: int = Field(128, ge=8, le=1024, description="Longest sequence; what is longer is truncated and counted")


class Training(Section):
    """How the base model is fine-tuned."""

    freeze: Literal["trunk", "encoder", "all_but_last_n", "none", "lora"] = Field(
        "trunk",
        description="What stays as it is. trunk: embedding, encoder and decoder; encoder: embedding and encoder; "
        "all_but_last_n: all but the decoder's last blocks and the head; none: nothing; lora: all, and low-rank "
        "changes of the attention's projections learn",
    )
    last_blocks: int = Field(2, ge=1, le=100, description="freeze all_but_last_n: how many decoder blocks learn")
    lora_rank: int = Field(8, ge=1, le=1024, description="freeze lora: rank of the changes")
    lora_alpha: float = Field(16, gt=0, le=10_000, description="freeze lora: the changes are scaled by alpha / rank")
    epochs: int = Field(3, ge=1, le=100, description="Passes over the training pairs")
    learning_rate: float = Field(3e-5, gt=0, le=10, description="Adam's step size")
    warmup_steps: int = Field(0, ge=0, le=1_000_000, description="Steps in which the step size rises from 0")
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of a step's gradients together; none: any")
    label_smoothing: float = Field(0, ge=0, lt=1, description="Share of a target's weight given to all tokens alike")
    patience: int | None = Field(
        None, ge=1, description="Stop after so many epochs without a lower validation loss; none: do all epochs"
    )
    batch_size: int = Field(64, ge=1, le=4096, description="Sentence pairs a step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the matrix products. auto: bfloat16 where the GPU or CPU has it, else float32"
    )
    decoder_states: Literal["store", "run", "off"] = Field(
        "store",
        description="freeze trunk: compute the frozen trunk once for each pair, and keep what it gives in the store "
        "for later runs, or for this run only; off: compute it anew in every epoch",
    )
    checkpoint_minutes: float = Field(10, gt=0, le=1440, description="A checkpoint so often, and after each epoch")
    seed: int = Field(0, ge=0, lt=2**32, description="Fixes the order of the data and everything random")

    @field_validator("precision", mode="before")
    @classmethod
    def _is_not_float16(cls, precision: Any) -> Any:
        if precision == "float16":
            raise ValueError("T5 overflows in float16 and gives NaN: use bfloat16 or float32")
        return precision

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings on which the trained model depends; the others change only how it comes about."""
        return self.model_dump(mode="json", exclude={"decoder_states", "checkpoint_minutes"})


class Evaluation(Section):
    """How candidate and champion are compared."""

    batch_size: int = Field(64, ge=1, le=4096, description="Sentences translated at once", json_schema_extra=EXPERT)
    max_new_tokens: int = Field(128, ge=8, le=1024, description="Longest translation, in tokens")
    beams: int = Field(
        1, ge=1, le=16, description="Hypotheses that the search keeps; 1 is greedy", json_schema_extra=EXPERT
    )
    engine: Literal["tensorflow", "ctranslate2"] = Field(
        "tensorflow",
        description="What translates; ctranslate2 is believed only where it agrees with tensorflow",
        json_schema_extra=EXPERT,
    )
    extra_sets: dict[Name, str] = Field(
        {},
        description="More test sets, as NAME: SOURCE; a .tsv or .parquet of two columns, or a dataset's test split",
    )


class Gate(Section):
    """What a candidate must show to be promoted. A limit that is not set refuses."""

    max_validation_loss: float | None = Field(None, gt=0, description="Highest loss per target token")
    validation_loss_margin: float | None = Field(None, description="How far above the champion's the loss may be")
    min_bleu: float | None = Field(None, ge=0, le=100, description="Lowest BLEU on the test split")
    non_inferiority_margin: float | None = Field(None, ge=0, description="BLEU that may be lost against the champion")
    min_gain: float | None = Field(None, description="BLEU that must be gained over the champion; 0 asks for any gain")
    confidence: float = Field(0.96, gt=0.5, lt=1, description="Confidence of what is said of differences")
    bootstrap_samples: int = Field(
        1000, ge=100, le=100_000, description="Resamples of the test split", json_schema_extra=EXPERT
    )
    min_length_ratio: float | None = Field(None, ge=0, description="Shortest output, relative to the references")
    max_length_ratio: float | None = Field(None, ge=0, description="Longest output, relative to the references")
    max_empty: Fraction | None = Field(None, description="Largest share of empty translations")
    max_copied: Fraction | None = Field(None, description="Largest share of translations that repeat the source")
    max_repeating: Fraction | None = Field(None, description="Largest share of translations stuck in a repetition")
    max_unknown: Fraction | None = Field(None, description="Largest share of output tokens that stand for no text")
    max_slice_loss: float | None = Field(
        None, ge=0, description="BLEU that any slice may surely lose against the champion"
    )
    max_leak: float | None = Field(
        None, ge=0, description="How much further the loss may fall on the test split than on the validation split"
    )
    extra_min_bleu: dict[Name, float] = Field(
        {}, description="Lowest BLEU on each extra test set, as NAME: BLEU", json_schema_extra=EXPERT
    )


class Promotion(Section):
    """What a version carries besides the model."""

    int8_margin: float | None = Field(
        None,
        ge=0,
        description="BLEU that a CTranslate2 copy in int8, for services on CPUs, may lose to be published with the "
        "model; none: no copy is made",
        json_schema_extra=EXPERT,
    )


class Costs(Section):
    """What computing costs, for the report."""

    cpu_hour: float | None = Field(
        None, ge=0, description="Price of an hour of a step without a GPU, in any currency", json_schema_extra=EXPERT
    )
    gpu_hour: float | None = Field(
        None, ge=0, description="Price of an hour of a step with a GPU", json_schema_extra=EXPERT
    )


class Operation(Section):
    """How Airflow treats a pipeline's runs, and who hears of them."""

    priority: int = Field(5, ge=1, le=10, description="Which pipeline gets the GPU first; 10 goes before 1")
    late_after_hours: float = Field(24, gt=0, description="A run that takes longer is reported as late")
    approval_hours: float = Field(72, gt=0, description="With approval by a person: unanswered for so long means no")
    stale_after_weeks: int = Field(4, ge=1, description="Say so when nothing has been promoted for longer")
    alert_emails: list[Annotated[str, Field(pattern=r"^[^@\s<>]+@[^@\s<>]+$")]] = Field(
        [], description="Who is told, through the Airflow connection smtp_default"
    )
    alert_webhook: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="Airflow connection of a webhook (Slack and what speaks like it) that is told",
    )


class Settings(Section):
    """One pipeline: what it trains from what, how it is judged, and when it runs."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", description="The model's name in the registry")
    description: str = Field(description="One line for people")
    schedule: str | None = Field(None, description="Cron expression (UTC), or none for manual runs only")
    approval: Literal["automatic", "human"] = Field(
        "automatic", description="human: a person has to approve what the gate would promote"
    )
    operation: Operation = Operation()
    preset: Literal["full", "quick"] = Field(
        "full",
        description="The quick check takes 2,000 training pairs, 200 to judge by and one epoch, to see that everything "
        "works. It is judged like any run. What is changed below goes before it",
        json_schema_extra={"values_display": {"full": "Full: as the pipeline's file says", "quick": "Quick check"}},
    )
    force: bool = Field(False, description="Train even when nothing has changed since production")
    data: Data
    base_model: BaseModelSource
    validation: Validation = Validation()
    preprocessing: Preprocessing
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    promotion: Promotion = Promotion()
    costs: Costs = Costs()

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, schedule: str | None) -> str | None:
        if schedule is not None and not croniter.is_valid(schedule):
            raise ValueError("expected a cron expression, as '0 4 * * 1'")
        if schedule is not None:
            try:
                croniter(schedule).get_next()
            except CroniterBadDateError:  # as the 31st of February
                raise ValueError("expected a cron expression for a time that comes") from None
        return schedule

    @model_validator(mode="after")
    def _limits_fit_together(self) -> Settings:
        low, high = self.gate.min_length_ratio, self.gate.max_length_ratio
        if low is not None and high is not None and low > high:
            raise ValueError(f"gate.min_length_ratio ({low}) is above gate.max_length_ratio ({high})")
        if "test" in self.evaluation.extra_sets:
            raise ValueError("evaluation.extra_sets: 'test' is the corpus's own test split: choose another name")
        if strangers := sorted(self.gate.extra_min_bleu.keys() - self.evaluation.extra_sets.keys()):
            raise ValueError(f"gate.extra_min_bleu names {strangers[0]!r}, which is not in evaluation.extra_sets")
        return self


# A pipeline's identity and the shape of its DAG: changed in its file, never for one run.
FIXED = ("name", "description", "schedule", "approval", "operation")
MAPPINGS = (
    "validation.mostly_by_rule",
    "evaluation.extra_sets",
    "gate.extra_min_bleu",
)  # settings whose value is a mapping


def load(path: Path, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a pipeline's file, with settings replaced by name (`{"training.epochs": 1}`).

    Raises `SettingsError` that names each field that is unknown, missing or impossible, and says what was expected.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    overrides = overrides or {}
    preset = PRESETS.get(str(overrides.get("preset", content.get("preset"))), {})
    return override(content, {**preset, **overrides}, str(path))


def override(content: dict[str, Any], overrides: dict[str, Any], path: str) -> Settings:
    """Settings with some replaced by name. Raises `SettingsError`; `path` says in it where the content is from."""
    content = copy.deepcopy(content)
    for name, value in overrides.items():
        if name.split(".")[0] in FIXED:
            raise SettingsError(f"{path}: {name} is fixed by the file and cannot be changed for one run")
        *sections, leaf = name.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise SettingsError(f"{path}: {name} is not a setting: {section} is a value, not a section")
        if isinstance(value, dict) and name not in MAPPINGS:
            raise SettingsError(f"{path}: {name} is a section: name one of its settings, as in training.epochs=1")
        target[leaf] = value
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"{path}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A validation error as one sentence: each field by its full name, what was wrong, and what was found."""
    faults = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        found = "" if fault["type"] == "missing" or not fault["loc"] else f", found {fault['input']!r}"
        message = (
            "is not a setting" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        )
        faults.append(f"{name}: {message}{found}" if name else message)
    return "; ".join(faults)


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` arguments as overrides; the value is read as JSON, or else taken as text."""
    overrides = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r}: expected NAME=VALUE, as in training.epochs=1")
        try:
            overrides[name] = json.loads(text)
        except ValueError:
            overrides[name] = text
    return overrides


def form_fields(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings that one run may change, by name, each as a JSON schema with the file's value as `default`.

    `section`, `title` and `description` are there for the form that shows them; `expert` marks what it leaves out.
    """
    fields: dict[str, dict[str, Any]] = {}
    schema = _schema()
    values = settings.model_dump()
    for name, field in schema["properties"].items():
        if name.split(".")[0] in FIXED:
            continue
        section = schema["$defs"].get(field.get("$ref", "").rsplit("/", 1)[-1])
        if section is None:
            fields[name] = {**_form_schema(field), "default": values[name], "section": "Run"}
            continue
        for leaf, leaf_field in section["properties"].items():
            fields[f"{name}.{leaf}"] = {
                **_form_schema(leaf_field),
                "default": values[name][leaf],
                "section": name.replace("_", " ").capitalize(),
            }
    return fields


@cache
def _schema() -> dict[str, Any]:
    """The settings' JSON schema: made once, not once a pipeline."""
    return Settings.model_json_schema()


def _form_schema(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema as Airflow's form understands it: an optional value as a list of types, not as `anyOf`."""
    schema = {key: value for key, value in field.items() if key not in {"anyOf", "default"}}
    schema["title"] = schema["title"].capitalize().replace("bleu", "BLEU")
    for option in field.get("anyOf", []):
        if option != {"type": "null"}:
            schema.update(option, type=[option["type"], "null"])
    return schema


def slug(text: str) -> str:
    """A name safe in an object key and a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text.lower()).strip("-._") or "unnamed"
