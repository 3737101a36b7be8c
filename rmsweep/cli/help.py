"""What --help prints: verbs, and the config groups with their options, read from conf/."""

from __future__ import annotations

import textwrap

from rmsweep.presets import Presets

VERBS = {
    "run": "run a sweep: compose its cells, compute those that are not done, write results.parquet",
    "plan": "count a sweep's cells (new, done, failed, skipped and why), banks, disk and cost; run nothing",
    "status": "states of a sweep's cells: counts, failures by cause",
    "results": "the table of results; SQL over it",
    "retry": "run a sweep's failed cells again",
    "completion": "print the completion script of a shell",
}

OVERVIEW = f"""\
usage: rmsweep VERB [KEY=VALUE ...]

Controlled sweeps over preference-based reward models.

{chr(10).join(f"  {verb:11} {text}" for verb, text in VERBS.items())}

  rmsweep run                                            the demo sweep, 54 cells on a simulated world
  rmsweep run reward_model=bt_mlp,clf_mlp beta=0.5,1,3   several values of a key are an axis
  rmsweep run sweep=paper/quality size=small             a named sweep, one axis replaced
  rmsweep plan sweep=paper/full                          what it would take
  rmsweep results --sql "select reward_model, avg(golden_improvement) from results group by 1"

The same command again continues where it stopped. Everything is written below root=DIR (default: outputs).
`rmsweep VERB --help` says more. Exit codes: 0 all cells done or skipped, 1 bad input (nothing was run),
2 some cells failed or diverged, 3 the store cannot be written, 130/143 interrupted."""

USAGE = {
    "run": "rmsweep run [KEY=VALUE ...] [--cfg] [--config-dir DIR] [--plugin FILE.py]",
    "plan": "rmsweep plan [KEY=VALUE ...] [--cfg] [--config-dir DIR] [--plugin FILE.py]",
    "status": "rmsweep status [SWEEP] [--json] [root=DIR]",
    "results": 'rmsweep results [SWEEP] [--sql "..."] [--csv] [--schema] [root=DIR]',
    "retry": "rmsweep retry [SWEEP] [KEY=VALUE ...] [root=DIR]     # KEY=VALUE: cells with this label",
    "completion": 'rmsweep completion bash|zsh        # eval "$(rmsweep completion bash)"',
}

GRAMMAR = """\
One override per word, in Hydra's grammar (quote what your shell would touch):
  beta=3                       a value             'seed=range(5)'              an axis: 0, 1, 2, 3, 4
  beta=0.5,1,3                 an axis             'reward_model=glob(bt_*)'    an axis over options
  reward_model.hidden=[64,32]  a list as one value 'reward_model.hidden=[64],[64,32]'   an axis of lists
  error_rate=0.2               beta is solved for it                             ~beta   back to the default
  sweep=paper/quality          a named sweep; a value given here replaces that axis, the others stay
  sweep.name=NAME  'sweep.exclude=[{candidates: similar, pairing: cross_prompt}]'
Without sweep= and without any key of a cell, `run` is sweep=demo; with one it departs from the baseline."""

OPTIONS = """\
  --cfg              print the (first) cell's composed config as YAML and stop
  --config-dir DIR   your own config groups, laid out like conf/ (may be repeated)
  --plugin FILE.py   your own components; the file's digest enters the fingerprints (may be repeated)
  -m, --multirun     accepted, not needed"""


def verb_help(verb: str, presets: Presets | None = None) -> str:
    """The help text of one verb; `run` and `plan` list groups, options and keys."""
    head = f"usage: {USAGE[verb]}\n\n{VERBS[verb]}"
    if verb not in ("run", "plan"):
        return head
    presets = presets or Presets()
    return "\n\n".join(
        [
            head,
            OPTIONS,
            GRAMMAR,
            "Config groups (* = baseline):\n" + _groups(presets),
            "Keys:\n" + _keys(presets),
        ]
    )


def _groups(presets: Presets) -> str:
    lines = []
    for group in presets.groups:
        chosen = presets.baseline_choices.get(group)
        options = ", ".join(f"{option}*" if option == chosen else option for option in presets.options(group))
        lines.append(
            textwrap.fill(f"{group:13} {options}", 110, initial_indent="  ", subsequent_indent=" " * 16,
                          break_on_hyphens=False)
        )  # fmt: skip
    return "\n".join(lines)


def _keys(presets: Presets) -> str:
    """The values of conf/config.yaml with their comments, as they stand there."""
    lines = (presets.folders[0] / "config.yaml").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "_self_" in line) + 1
    return "\n".join(f"  {line}" for line in lines[start:] if line.strip())
