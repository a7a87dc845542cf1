"""Settings from YAML: what is taken, and what is refused (rows C2 to C4)."""

import dataclasses

import pytest

from cbam.app.config import read_config
from cbam.errors import ConfigError
from cbam.studies.settings import Settings
from cbam.train.folder import write_config
from cbam.train.recipes import RECIPES, Config


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def reader(text: str | bytes) -> dict:
        (tmp_path / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return read_config("c.yaml", Settings)

    return reader


def test_a_config_names_the_options(read):
    found = read(
        "data: pictures/2024\nattention: [cbam, channel]\nbatch-size: 8\nlr: 1\n"
        "from-scratch: yes\nmodel: null\nseeds: 2 # few\n"
    )
    assert found == {
        "data": "pictures/2024", "attention": ("cbam", "channel"), "batch_size": 8, "lr": 1.0,
        "from_scratch": True, "model": None, "seeds": 2,
    }  # fmt: skip
    assert type(found["lr"]) is float
    Settings(**found)


def test_an_empty_config_sets_nothing(read):
    assert read("# nothing\n") == {}


def test_names_that_look_like_numbers_stay_names(read):
    assert read("data: 2024\nmodel: 1e3\nattention: se") == {
        "data": "2024",
        "model": "1e3",
        "attention": ("se",),
    }


def test_numbers_with_an_exponent_are_numbers(read):
    found = read("lr: 1e-3\nseeds: 1\n")
    assert found["lr"] == 0.001
    with pytest.raises(ConfigError, match=r"lr must be a number, got '1e-3'"):
        read("lr: '1e-3'")


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_that_a_run_wrote_are_read_as_they_were(name, tmp_path):
    write_config(tmp_path, dataclasses.asdict(RECIPES[name]()))
    assert Config(**read_config(str(tmp_path / "config.json"), Config)) == RECIPES[name]()


def test_a_misspelt_key_is_reported_with_its_line_and_nearest_match(read):
    # C2
    with pytest.raises(ConfigError, match=r"unknown key 'ephocs' \(c.yaml:2\); did you mean 'epochs'\?"):
        read("seeds: 1\nephocs: 3\n")


def test_all_problems_of_a_config_are_reported_together(read):
    # C3
    with pytest.raises(ConfigError) as caught:
        read("epochs: many\nlr: fast\nattention: {a: b}\nzzz: 1\nfrom_scratch: 7\nseeds: [1]\n")
    told = str(caught.value)
    for part in (
        "epochs must be a whole number, got 'many' (c.yaml:1)",
        "lr must be a number, got 'fast'",
        "attention must be",
        "unknown key 'zzz' (c.yaml:4)",
        "from_scratch must be true or false, got '7'",
        "seeds must be a whole number, got a list",
    ):
        assert part in told


def test_a_tag_runs_nothing_and_is_refused(read, tmp_path):
    # C4
    with pytest.raises(ConfigError, match="model must be a string"):
        read(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert not (tmp_path / "made").exists()
    with pytest.raises(ConfigError, match="epochs must be"):
        read("epochs: !!python/name:os.system 3")


def test_an_alias_bomb_is_refused_before_it_grows(read):
    # C4
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="more than 100 aliases or 20 levels"):
        read("\n".join(lines))


def test_a_duplicate_key_is_refused(read):
    # C4
    with pytest.raises(ConfigError, match=r"duplicate key 'epochs' \(c.yaml:3\)"):
        read("epochs: 1\nseeds: 2\nepochs: 3\n")


def test_a_config_above_a_megabyte_is_refused(read):
    # C4
    with pytest.raises(ConfigError, match="larger than 1024 KiB"):
        read("#" * ((1 << 20) + 1))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "just text",
        "a: b: c",
        "a: [",
        "\t- x",
        b"\xff\xfe\x00",
        b"a: \x00",
        "a: 1\n---\nb: 2",
        "[" * 900_000,
    ],
)
def test_a_config_that_is_no_mapping_is_one_clear_error(read, text):
    with pytest.raises(ConfigError, match=r"config c\.yaml: "):
        read(text)


def test_a_missing_config_is_an_error():
    # C1
    with pytest.raises(ConfigError, match=r"config nowhere\.yaml: No such file"):
        read_config("nowhere.yaml", Settings)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config(".", Settings)


@pytest.mark.parametrize("name", ["learning_rate", "lerning_rate", "learning-rate"])
def test_the_learning_rate_is_known_by_its_long_name(read, name):  # C2
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        read(f"{name}: 0.1")
