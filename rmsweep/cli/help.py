"""What --help prints: verbs, and the config groups with their options, read from conf/."""

from __future__ import annotations

import textwrap

from rmsweep.causes import CAUSES
from rmsweep.presets import Presets

VERBS = {
    "run": "run a sweep: compose its cells, compute those that are not done, write results.parquet",
    "plan": "count a sweep's cells (new, done, failed, skipped and why), banks, disk and cost; run nothing",
    "status": "states of a sweep's cells: counts, failures by cause, slots on a cluster",
    "log": "what became of one cell: its state, what the logs say, who has it in hand",
    "cancel": "cancel a sweep's slots on a cluster; what is stored stays",
    "results": "the table of results; SQL over it",
    "retry": "run a sweep's failed cells again",
    "verify": "check every checksum under a root, and recompute a sample of finished cells; change nothing",
    "gc": "remove what killed runs left behind; report, and on demand remove, what no sweep refers to",
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
2 some cells failed, diverged or are left, 3 the store cannot be written, 4 verify found a mismatch;
129, 130, 143 interrupted: by a closed terminal, Ctrl-C, SIGTERM; the same command continues."""

USAGE = {
    "run": "rmsweep run [KEY=VALUE ...] [--detach] [--cfg] [--config-dir DIR] [--plugin FILE.py] [--reuse WHICH]",
    "plan": "rmsweep plan [KEY=VALUE ...] [--why CELL] [and the options of run]",
    "status": "rmsweep status [SWEEP] [--json] [root=DIR]",
    "log": "rmsweep log CELL [SWEEP] [root=DIR]",
    "cancel": "rmsweep cancel [SWEEP] [root=DIR]",
    "results": 'rmsweep results [SWEEP] [--sql "..."] [--csv] [--schema] [root=DIR]',
    "retry": "rmsweep retry [SWEEP] [KEY=VALUE ...] [--cause CAUSE[,CAUSE]] [--detach] [--plugin FILE.py] [root=DIR]",
    "verify": "rmsweep verify [SWEEP] [--sample N] [--seed S] [--plugin FILE.py] [root=DIR]",
    "gc": "rmsweep gc [--dry-run] [--unreferenced] [--quarantine] [root=DIR]",
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
  --reuse WHICH      versions (default): a stored result counts where config, data and the declared versions of stages
                     and components are the same; strict: only where their code and the installed libraries are too.
                     A sweep keeps what it was last given
  -m, --multirun     accepted, not needed"""

DETACH = """\
  --detach           with engine=slurm: submit the slots and return; the last one that ends writes the tables"""

WHY = """\
  --why CELL         is this cell stored, and if not, what differs from the nearest stored one? CELL: the first digits
                     of a cell_id of the plan, or `new`: a summary of all new cells"""


DETAILS = {
    "status": """\
Without SWEEP: the last one.
  --json             everything, for a program""",
    "log": """\
CELL: the first digits of a cell_id, as `rmsweep status` and `rmsweep results` show them. Without SWEEP: the last one.
Shows the cell's state, the last attempt, the lines of its unit's log with the traceback, and on a cluster the slot that
has it in hand with the end of what that printed.""",
    "cancel": """\
Without SWEEP: the last one. Nothing is submitted or requeued until the next `rmsweep run` of the sweep.""",
    "results": """\
Without SWEEP: the last one.
  --sql QUERY        rows of a query (DuckDB) over the tables results, prompts and costs
  --csv              comma-separated, lists as JSON
  --schema           what the columns mean""",
    "retry": f"""\
Runs the failed cells again; the done ones stay. Without SWEEP: the last one.
  KEY=VALUE          only cells with this label, such as reward_model=bt_mlp; engine.workers=2 and the like as for run
  --cause CAUSE[,CAUSE]
                     only cells that ended for one of these causes (without it all that failed, none that diverged):
{chr(10).join(f"    {cause:16} {meaning}" for cause, meaning in CAUSES.items())}
{DETACH}
  --plugin FILE.py   a plug-in that the sweep was planned with; none is imported that is not given""",
    "verify": """\
Checks every bank, part of results, costs and kept arrays against its checksum, and plan and tables of one sweep or of
all. A table that newer records have overtaken is stale, not wrong. Exit code 4 where anything is wrong, 0 otherwise.
  --sample N         also compute N done cells again, in turn from every reward model, and compare them bit for bit
  --seed S           which cells (default 0)
  --plugin FILE.py   a plug-in that the sweep was planned with; --sample imports none that is not given""",
    "gc": """\
Removes temporary files, claims and status files whose process has ended, and lists artefacts that no sweep's plan
refers to. It may run beside `rmsweep run`. Where runs of other machines may be alive it watches them first.
  --dry-run          change nothing, say what would be removed
  --unreferenced     also remove banks, results, costs and kept arrays of no sweep; refused while a run is alive
  --quarantine       also empty store/quarantine""",
}


def verb_help(verb: str, presets: Presets | None = None) -> str:
    """The help text of one verb; `run` and `plan` list groups, options and keys."""
    head = f"usage: {USAGE[verb]}\n\n{VERBS[verb]}"
    if verb not in ("run", "plan"):
        return "\n\n".join([head, *([DETAILS[verb]] if verb in DETAILS else [])])
    presets = presets or Presets()
    return "\n\n".join(
        [
            head,
            f"{OPTIONS}\n{WHY if verb == 'plan' else DETACH}",
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
