"""The columns of results.parquet, prompts.parquet and costs.parquet: name, type, meaning."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 3
F, I, S, LF, LI = pa.float64(), pa.int64(), pa.string(), pa.list_(pa.float64()), pa.list_(pa.int64())  # noqa: E741


class Column(NamedTuple):
    """One column of a table."""

    name: str
    type: pa.DataType
    doc: str


AXES = (
    Column("base_llm", S, "option of conf/base_llm: what sampled the responses"),
    Column("dataset", S, "option of conf/dataset"),
    Column("size", S, "option of conf/size (simulated banks)"),
    Column("embedder", S, "option of conf/embedder"),
    Column("candidates", S, "which of a prompt's responses may be compared"),
    Column("pairing", S, "same_prompt or cross_prompt"),
    Column("annotator", S, "option of conf/annotator"),
    Column("beta", F, "annotation quality (the solution where error_rate is set)"),
    Column("error_rate", F, "annotation error rate asked for, null where beta is given"),
    Column("n_annotations", I, "number of preferences"),
    Column("pairs_per_prompt", I, "comparisons per visit of a prompt"),
    Column("reward_model", S, "option of conf/reward_model"),
    Column("protocol", S, "option of conf/protocol: how the model was fitted"),
    Column("seed", I, "the cell's seed: candidates, pairing, annotation, split, init, order"),
)

METRICS = (
    Column("bon_n", LI, "the N of bon_golden: 1..M"),
    Column("bon_golden", LF, "expected golden reward of the pick among N responses, exact over subsets"),
    Column("golden_improvement", F, "golden reward of the pick among all responses minus the prompt's mean, averaged"),
    Column("golden_random", F, "mean golden reward of a random pick"),
    Column("golden_best", F, "mean golden reward of the best response of each prompt"),
    Column("golden_ceiling", F, "golden reward of the pick by E[golden | embedding]; simulated banks only"),
    Column("spearman", F, "mean over prompts of the rank correlation of score and golden reward"),
    Column("agreement", F, "share of same-prompt test pairs ordered as the golden rewards, score ties one half"),
    Column("agreement_cross_prompt", F, "the same over pairs of responses to different prompts"),
    Column("agreement_noisy", F, "expected agreement with the cell's annotator on same-prompt test pairs"),
    Column("agreement_noisy_cross_prompt", F, "the same on cross-prompt test pairs"),
    Column("pick_quantile", F, "mid-rank of the pick's golden reward among the prompt's responses, in (0, 1)"),
    Column("tilt_tau", LF, "temperatures tau of the policy softmax(score / tau) over the M responses"),
    Column("tilt_golden", LF, "its golden reward, raw scores"),
    Column("tilt_kl", LF, "its KL divergence from the uniform pick in nats, raw scores"),
    Column("tilt_golden_calibrated", LF, "its golden reward after monotone recalibration of scores to golden units"),
    Column("tilt_kl_calibrated", LF, "its KL after monotone recalibration"),
    Column("annotation_error_rate", F, "realised share of preferences against the golden order, ties left out"),
    Column("golden_gap", F, "mean |golden difference| of the comparisons, in the bank's units"),
    Column("n_train", I, "distinct comparisons with a training example"),
    Column(
        "n_validation", I, "distinct comparisons with a validation example; under protocol=released many are in both"
    ),
    Column("epochs", I, "epochs run (boosting rounds, iterations)"),
    Column("best_epoch", I, "epoch of the lowest validation loss, from 1"),
    Column("train_loss", F, "training loss of the model kept"),
    Column("validation_loss", F, "validation loss of the model kept"),
    Column(
        "l2", F, "regularisation strength (linear models), weight decay (MLPs); tuned on held-out comparisons or set"
    ),
    Column("learning_rate", F, "of the optimiser (MLPs); tuned on held-out comparisons under protocol=converged"),
)

STATUS = (
    Column("cell_id", S, "hash of the cell's config and inputs"),
    Column("status", S, "done, failed, diverged or skipped"),
    Column("reason", S, "why a cell is not done"),
    Column("cause", S, "why in one word: oom, timeout, diverged, data, bug, preempted; null where skipped"),
)

COSTS = (
    Column("cell_id", S, "joins results.parquet"),
    Column("fingerprint", S, "cell_id with stage versions, device class and precision"),
    Column("unit", S, "unit the cell ran in; its log is logs/<unit>.log"),
    Column("seconds_annotate", F, "wall time"),
    Column("seconds_train", F, "wall time; where a GPU fits cells together, their common time shared out evenly"),
    Column("seconds_evaluate", F, "wall time, the scoring of cells fitted together likewise"),
    Column("peak_memory_mib", F, "peak resident memory of the worker so far"),
    Column("attempt", I, "1 for the first try"),
    Column("host", S, "machine name"),
    Column("versions", S, "library versions, JSON"),
    Column("code", S, "digest of the code of each stage, JSON"),
    Column("identity", S, "what cell_id and fingerprint are hashes of, JSON; see `rmsweep plan --why`"),
    Column("traceback", S, "of a failed cell"),
)


def arrow(columns: tuple[Column, ...]) -> pa.Schema:
    """The Arrow schema of a list of columns."""
    return pa.schema([(c.name, c.type) for c in columns])


MEASURED = (Column("n_annotations", I, ""), Column("beta", F, ""))
RECORD = arrow(  # attempt: of one that is not done, so that the last one counts
    (Column("fingerprint", S, ""), *STATUS, Column("attempt", I, ""), *MEASURED, *METRICS)
).append(pa.field("golden_picked", pa.list_(pa.float32())))
