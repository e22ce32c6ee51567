"""Settings of a program: a dataclass whose fields carry their value, their meaning and their range.

@dataclass
class Settings:
    K: int = setting(9, "rollouts that estimate the value of each state", min=1)

settings, given = parse(Settings, sys.argv[1:], __doc__, PRESETS, other={})
"""

import argparse
from dataclasses import field, fields

from transformers import HfArgumentParser


def setting(default, help, *, min=None, above=None, max=None, choices=None, may_change=False, is_text=False):
    """A field of a settings dataclass.

    min, max: its range, both included; above: the lower end, excluded. choices: its possible
    values. may_change: a resumed run may set it otherwise, since it changes the machine or the
    reports but not what is learned. is_text: \\n on the command line is a line end, as --help shows it.
    """
    metadata = dict(help=help, min=min, above=above, max=max, may_change=may_change, is_text=is_text)
    return field(default=default, metadata=metadata | ({"choices": choices} if choices else {}))


class _Parser(HfArgumentParser):
    """HfArgumentParser gives argparse all of a field's metadata."""

    def add_argument(self, *names, **options):
        ours = ("min", "above", "max", "may_change", "is_text")
        return super().add_argument(*names, **{k: v for k, v in options.items() if k not in ours})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; shows the defaults that hold for the --dataset given."""


def parse(settings_class, argv, doc, presets, other):
    """(settings, names that the command line gives), with every value in its range; raises ValueError.

    presets: {dataset: {name: value}} in place of the declared defaults; other: those of any other
    dataset.
    """
    parser = _Parser(settings_class, description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
    only_dataset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_dataset.add_argument("--dataset", default=parser.get_default("dataset"))
    dataset = only_dataset.parse_known_args(argv)[0].dataset
    names = {f.name for f in fields(settings_class)}
    parser.set_defaults(**{k: v for k, v in presets.get(dataset, other).items() if k in names})
    (settings,) = parser.parse_args_into_dataclasses(argv)
    check_ranges(settings)
    for f in fields(settings):
        if f.metadata["is_text"] and (text := getattr(settings, f.name)):
            setattr(settings, f.name, text.replace("\\n", "\n"))
    given = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    return settings, names & given


def require(condition, message):
    """Raise ValueError, with a message for the user, where a condition of the settings is not met."""
    if not condition:
        raise ValueError(message)


def check_ranges(settings):
    """Raise ValueError for the first setting that is out of its declared range."""
    for f in fields(settings):
        value, low, above, high = getattr(settings, f.name), *(f.metadata[k] for k in ("min", "above", "max"))
        if value is None or low is above is high is None:
            continue
        lower = f"at least {low}" if low is not None else f"above {above}"
        upper = "" if high is None else f" and at most {high}"
        fits = (
            (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )
        require(fits, f"--{f.name} {value} must be {lower}{upper}")


def may_change(settings):
    """Names of the settings that a resumed run may set otherwise."""
    return {f.name for f in fields(settings) if f.metadata["may_change"]}
