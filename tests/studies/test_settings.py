import pytest

from cbam.errors import ConfigError
from cbam.nn import ATTENTION as MODULES
from cbam.studies import Settings
from cbam.studies.report import LABELS
from cbam.studies.settings import ATTENTION, NO_IDENTITY


def test_every_attention_of_the_command_line_has_a_module_and_a_label():
    assert set(ATTENTION) == set(MODULES) == set(LABELS) - {"plain"}


def test_attention_without_an_identity_start_is_compared_only_from_scratch():
    assert set(NO_IDENTITY) == {name for name, make in MODULES.items() if not hasattr(make(64), "identity_")}
    assert Settings(attention=NO_IDENTITY, from_scratch=True).attention == NO_IDENTITY
    with pytest.raises(ConfigError, match="simam has no identity start"):
        Settings(attention=("cbam", "simam"))


def test_all_problems_are_reported_together():
    # C3
    with pytest.raises(ConfigError) as caught:
        Settings(epochs=0, seeds=-1, lr=0, device="gpu", workers=-2, size=3)
    told = str(caught.value)
    for name in ("epochs", "seeds", "lr", "device", "workers", "size"):
        assert name in told


def test_an_unknown_attention_is_answered_with_the_nearest():
    # C6
    with pytest.raises(ConfigError, match="unknown attention 'cbm'; nearest: cbam"):
        Settings(attention=("se", "cbm"))


def test_a_folder_after_the_attention_option_is_refused_with_a_hint(tmp_path):
    # C6
    with pytest.raises(ConfigError, match="goes before --attention"):
        Settings(attention=("se", str(tmp_path)))
    with pytest.raises(ConfigError, match="nearest"):
        Settings(data="photos", attention=("se", str(tmp_path)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"attention": ()}, "at least one"),
        ({"attention": ("se", "se")}, "twice"),
        ({"model": "resnet18+cbam"}, "must be the plain network"),
        ({"from_scratch": True, "pretrained": "a.pth"}, "exclude each other"),
        ({"data": ""}, "data must be a non-empty string"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"limit": 2.5}, "limit must be a whole number"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(given, told):
    with pytest.raises(ConfigError, match=told):
        Settings(**given)
