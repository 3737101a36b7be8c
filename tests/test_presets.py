"""conf/ is data: what is read, what is refused."""

import pytest

from rmsweep.errors import ConfigError
from rmsweep.presets import Presets, read_yaml

BAD = {
    "alias bomb": ("a: &x [1, 1]\nb: [*x, *x]\n", "aliases"),
    "python tag": ("a: !!python/object/apply:os.system [echo]\n", "tags"),
    "tag that breaks its reader": ("a: !!int ''\n", "tags"),
    "duplicate key": ("a: 1\na: 2\n", "stands twice"),
    "environment": ("a: ${oc.env:HOME}\n", "interpolation"),
    "nested environment": ("a: {b: [1, '${oc.env:HOME}']}\n", "interpolation"),
    "list": ("- 1\n", "must be a mapping"),
    "broken": ("a: [1\n", "expected"),
    "binary": ("\x00", "special characters"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_dangerous_or_broken_yaml_is_refused(tmp_path, text, message):
    """Nothing executes from a config, nothing grows without bound, nothing is silently overwritten."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "x.yaml" in str(caught.value)


def test_words_and_numbers_read_as_hydra_reads_them(tmp_path):
    """`on`, `no` and `yes` are names, 1e-3 is a number."""
    (tmp_path / "x.yaml").write_text("a: on\nb: 1e-3\nc: true\nd: no\ne: 3\nf: .inf\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": "on", "b": 1e-3, "c": True, "d": "no", "e": 3, "f": float("inf")}


def test_options_are_completed_with_their_components_defaults():
    """What a preset leaves out can be overridden without `+`."""
    node = Presets().node("reward_model", "bt_mlp")
    assert node == {"kind": "mlp", "objective": "bradley_terry", "hidden": None, "activation": "relu"}


def test_own_folders_add_and_replace_options(tmp_path):
    """--config-dir: the user's options beside ours; a later folder wins."""
    (tmp_path / "protocol").mkdir()
    (tmp_path / "protocol" / "patient.yaml").write_text("kind: clean\npatience: 9\n")
    presets = Presets([tmp_path])
    assert presets.node("protocol", "patient")["patience"] == 9 and "clean" in presets.options("protocol")


def test_unknown_option_lists_the_valid_ones():
    """A typing mistake names the valid choices."""
    with pytest.raises(ConfigError, match=r"Did you mean 'cross_prompt'.*Valid: cross_prompt, same_prompt"):
        Presets().node("pairing", "cross_promt")


@pytest.mark.parametrize("option", ["../../etc/passwd", "/etc/passwd", "..", "a b", "", "x" * 300])
def test_names_never_become_paths(option):
    """An option outside conf/ cannot be read, whatever it is called."""
    with pytest.raises(ConfigError, match="unknown"):
        Presets().node("pairing", option)


def test_missing_config_dir_is_named(tmp_path):
    """A mistyped --config-dir must not be ignored."""
    with pytest.raises(ConfigError, match="does not exist"):
        Presets([tmp_path / "nope"])
