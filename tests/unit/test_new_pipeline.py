"""`make new-pipeline`: a file that is valid as it is, and has a time of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.new_pipeline import when, write
from tasks.errors import SettingsError
from tasks.settings import load


@pytest.mark.parametrize("pair", ["en-fr", "en-xyz", "no-off"])
def test_file_is_valid_as_it_is(pair: str, tmp_path: Path) -> None:
    settings = load(write(pair, tmp_path))
    assert (settings.name, settings.data.pair) == (pair, pair)
    assert settings.schedule


def test_gate_lacks_no_limit_and_the_data_none_of_drift(tmp_path: Path) -> None:
    """A limit that is not set refuses every candidate, and one of drift tells nobody."""
    settings = load(write("en-fr", tmp_path))
    assert [name for name, limit in settings.gate if limit is None] == []
    assert [name for name, limit in settings.validation.drift_limits.items() if limit is None] == []


def test_prompt_names_the_languages(tmp_path: Path) -> None:
    assert load(write("en-fr", tmp_path)).preprocessing.prompt == "translate English to French: "


@pytest.mark.parametrize("pair", ["", "english", "en_fr", "../en-fr", "EN-FR"])
def test_what_is_no_pair_is_refused(pair: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected two languages, as en-fr"):
        write(pair, tmp_path)
    assert not list(tmp_path.iterdir())


def test_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "en-fr.yaml").write_text("mine")
    with pytest.raises(SettingsError, match="is there already"):
        write("en-fr", tmp_path)
    assert (tmp_path / "en-fr.yaml").read_text() == "mine"


@given(st.text(min_size=1))
def test_time_is_one_of_the_week_and_always_the_same(name: str) -> None:
    minute, hour, day = when(name)
    assert (0 <= minute < 60, 0 <= hour < 24, 0 <= day < 7) == (True, True, True)
    assert when(name) == (minute, hour, day)


def test_twenty_pairs_do_not_start_together() -> None:
    assert len({when(f"en-{language}l") for language in "abcdefghijklmnopqrst"}) == 20
