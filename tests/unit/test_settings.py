"""Settings: what is refused and what the refusal says; the file, the form and the overrides agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.errors import SettingsError
from tasks.settings import FIXED, MAPPINGS, Settings, Training, form_fields, load, parse_overrides

CONFIG = Path(__file__).resolve().parents[2] / "config"
DEMO = CONFIG / "demo.yaml"


@pytest.fixture
def edited(tmp_path: Path) -> Any:
    """Write the demo's file with some settings changed by dotted name (None: removed); returns its path."""

    def write(changes: dict[str, Any]) -> Path:
        content = yaml.safe_load(DEMO.read_text())
        for name, value in changes.items():
            *sections, leaf = name.split(".")
            target = content
            for section in sections:
                target = target.setdefault(section, {})
            target[leaf] = value
            if value is None:
                del target[leaf]
        path = tmp_path / "edited.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize("file", sorted(CONFIG.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_files_that_come_with_the_project_are_valid(file: Path) -> None:
    settings = load(file)
    limits = settings.gate.model_dump()
    assert None not in limits.values(), "a limit that is not set refuses every candidate"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {"epochs": 1}}, "trainning: is not a setting"),
        ({"training.epoch": 1}, "training.epoch: is not a setting"),
        ({"training.epochs": 0}, "training.epochs: Input should be greater than or equal to 1, found 0"),
        ({"training.epochs": "many"}, "training.epochs: Input should be a valid integer.*found 'many'"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate: .*found nan"),
        ({"training.freeze": "everything"}, "training.freeze: Input should be 'trunk', .*found 'everything'"),
        ({"data.pair": "English-Spanish"}, "data.pair: .*found 'English-Spanish'"),
        ({"gate.max_empty": 2}, "gate.max_empty: .*less than or equal to 1, found 2"),
        ({"gate.min_length_ratio": 3}, r"gate.min_length_ratio \(3.0\) is above gate.max_length_ratio \(1.2\)"),
        (
            {"gate.extra_min_bleu": {"flores": 20}},
            "gate.extra_min_bleu names 'flores', which is not in evaluation.extra",
        ),
        ({"evaluation.extra_sets": {"test": "x.tsv"}}, "evaluation.extra_sets: 'test' is the corpus's own test split"),
        ({"evaluation.extra_sets": {"a/b": "x.tsv"}}, "evaluation.extra_sets.*: String should match pattern"),
        ({"name": "My Model"}, "name: .*found 'My Model'"),
        ({"schedule": "0 0 31 2 *"}, "schedule: expected a cron expression for a time that comes, found '0 0 31 2 .'"),
        ({"schedule": ""}, "schedule: expected a cron expression.*found ''"),
        ({"training.seed": 2**32}, "training.seed: Input should be less than 4294967296, found 4294967296"),
        ({"gate.min_gain": False}, "gate.min_gain: is no switch: true and false mean nothing here, found False"),
        ({"training.epochs": True}, "training.epochs: is no switch.*found True"),
        ({"gate": True}, "gate: is no switch.*found True"),
        ({"gate": [1]}, r"gate: Input should be a valid dictionary.*found \[1\]"),
        ({"force": "perhaps"}, "force: Input should be a valid boolean.*found 'perhaps'"),
        ({"data.source": ""}, "data.source: String should have at least 1 character, found ''"),
        ({"base_model.source": ""}, "base_model.source: String should have at least 1 character, found ''"),
        ({"schedule": "every monday"}, "schedule: expected a cron expression.*found 'every monday'"),
        ({"data": None}, "data: Field required"),
        ({"data.source": None}, "data.source: Field required"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, edited: Any) -> None:
    with pytest.raises(SettingsError, match=f"edited.yaml: {message}"):
        load(edited(changes))


def test_every_fault_is_named_at_once(edited: Any) -> None:
    with pytest.raises(SettingsError, match=r"training.epochs: .*; gate.min_bleu: "):
        load(edited({"training.epochs": 0, "gate.min_bleu": -1}))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "cannot be read as YAML"), (b"\xff\xfe\xfa", "cannot be read as YAML"), (b"- a", "expected a mapping")],
)
def test_a_file_that_is_no_mapping_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=f"p.yaml: {message}"):
        load(tmp_path / "p.yaml")
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read"):
        load(tmp_path / "none.yaml")


def test_a_setting_is_changed_by_its_name() -> None:
    settings = load(DEMO, {"training.epochs": 7, "force": True, "data.max_train_rows": 10})
    assert (settings.training.epochs, settings.force, settings.data.max_train_rows) == (7, True, 10)
    assert load(DEMO).training.epochs == 4


def test_a_setting_of_a_section_that_the_file_leaves_out_can_be_changed(edited: Any) -> None:
    assert load(edited({"training": None}), {"training.epochs": 7}).training == Training(epochs=7)


def test_numbers_may_be_written_as_text_which_yaml_makes_of_1e_3() -> None:
    assert load(DEMO, {"training.learning_rate": "1e-3"}).training.learning_rate == 0.001


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, "x", f"{name} is fixed by the file") for name in FIXED),
        ("trianing.epochs", 1, "trianing: is not a setting"),
        ("training", {"epochs": 1}, "training is a section: name one of its settings"),
        ("training.epochs.more", 1, "training.epochs.more is not a setting: epochs is a value, not a section"),
        ("", 1, "is not a setting"),
        ("training", 5, "training: Input should be a valid dictionary.*found 5"),
        ("training", None, "training: Input should be a valid dictionary.*found None"),
    ],
)
def test_what_a_run_may_not_change_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(DEMO, {name: value})


def test_a_preset_goes_before_the_file_and_after_what_is_asked_for() -> None:
    quick = load(DEMO, {"preset": "quick"})
    assert (quick.training.epochs, quick.data.max_train_rows, quick.validation.min_train_rows) == (1, 2000, 100)
    assert load(DEMO, {"preset": "quick", "training.epochs": 7}).training.epochs == 7
    assert load(DEMO, {"preset": "full"}) == load(DEMO)
    with pytest.raises(SettingsError, match=r"preset: .*'full' or 'quick'"):
        load(DEMO, {"preset": "fast"})


def test_values_are_read_as_json_or_else_as_text() -> None:
    assert parse_overrides(["a=1", "b=null", "c=[1]", "d=some text", "e=x=y", 'f="1"', "g="]) == {
        **{"a": 1, "b": None, "c": [1], "d": "some text", "e": "x=y"},
        **{"f": "1", "g": ""},
    }
    with pytest.raises(SettingsError, match=r"expected NAME=VALUE, as in training\.epochs=1"):
        parse_overrides(["training.epochs"])


def test_the_forms_own_values_change_nothing() -> None:
    for file in CONFIG.glob("*.yaml"):
        settings = load(file)
        defaults = {name: field["default"] for name, field in form_fields(settings).items()}
        assert load(file, defaults) == settings
        assert all(field["description"] for field in form_fields(settings).values())


def test_the_form_has_every_setting_but_the_fixed_ones() -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        names = set()
        for name, value in values.items():
            section = isinstance(value, dict) and prefix + name not in MAPPINGS
            names |= leaves(value, f"{prefix}{name}.") if section else {prefix + name}
        return names

    settings = load(DEMO)
    fixed = {name for name in leaves(settings.model_dump()) if name.split(".")[0] in FIXED}
    assert set(form_fields(settings)) == leaves(settings.model_dump()) - fixed


def json_types(field: dict[str, Any]) -> list[str]:
    return field["type"] if isinstance(field["type"], list) else [field["type"]]


FORM = form_fields(load(DEMO))
NUMERIC = [name for name, field in FORM.items() if {"integer", "number"} & set(json_types(field))]
NUMBERS = st.one_of(
    st.integers(-10, 200_000),
    st.floats(-1e15, 1e15),
    st.sampled_from([0, 1, 0.5, 8, 100, 1024, 4096, 100_000, 2**32 - 1, 2**32]),
    st.none(),
    st.booleans(),
)


@given(st.sampled_from(NUMERIC), NUMBERS)
def test_the_form_refuses_a_number_just_when_the_settings_do(name: str, value: float | None) -> None:
    section, _, leaf = name.partition(".")
    model = type(getattr(load(DEMO), section))
    required = {"source": "x", "prompt": ""}
    content = {other: required[other] for other, field in model.model_fields.items() if field.is_required()}
    try:
        model.model_validate({**content, leaf: value})
        accepted = True
    except ValidationError:
        accepted = False
    schema = {key: value for key, value in FORM[name].items() if key not in {"default", "section"}}
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == accepted


@given(st.sampled_from(NUMERIC), st.integers(-10, 5000) | st.floats(allow_nan=True), st.booleans())
def test_an_override_is_what_the_file_could_say(name: str, value: float, as_text: bool) -> None:
    """Given by name, or by name on a command line: accepted with that value, or refused by that name."""
    given_ = parse_overrides([f"{name}={json.dumps(value)}"]) if as_text else {name: value}
    try:
        settings = load(DEMO, given_)
    except SettingsError as error:
        section_wide = "gate.min_length_ratio" in str(error) and name.startswith("gate.")
        assert f"{DEMO}: {name}: " in str(error) or section_wide
    else:
        section, _, leaf = name.partition(".")
        assert getattr(getattr(settings, section), leaf) == value


def test_settings_survive_being_written_down() -> None:
    settings = load(CONFIG / "en-es.yaml")
    assert Settings.model_validate(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings
