"""Off-the-shelf scikit-learn classifiers of chosen against rejected responses: a closed list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from rmsweep.bank import Floats, Split
from rmsweep.component import component
from rmsweep.errors import ConfigError, DesignError, unknown
from rmsweep.protocols import Examples
from rmsweep.reward_models import TrainingData, score_in_chunks
from rmsweep.reward_models._convert import gathered, widened
from rmsweep.reward_models._history import history, split_examples

CERTAIN = 40.0  # log odds where an estimator is certain: beyond the largest finite ones, -log 2^-53 = 36.7
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
FOREST: dict[str, Any] = {
    "n_estimators": Count,
    "max_depth": Count | None,
    "min_samples_leaf": Count,
    "max_features": Literal["sqrt", "log2"] | Annotated[float, Field(gt=0, le=1)] | None,
}


class Estimator(NamedTuple):
    """One entry of the closed list: constructor, what it is always given, the options allowed and their types."""

    make: Callable[..., Any]
    fixed: Mapping[str, Any]
    options: Mapping[str, Any]
    standardised: bool = False
    seeded: bool = True


ESTIMATORS: dict[str, Estimator] = {
    "logistic_regression": Estimator(
        LogisticRegression, {"max_iter": 1000}, {"C": Positive, "max_iter": Count}, standardised=True
    ),
    "random_forest": Estimator(RandomForestClassifier, {"n_jobs": 1}, FOREST),
    "extra_trees": Estimator(ExtraTreesClassifier, {"n_jobs": 1}, FOREST),
    "hist_gradient_boosting": Estimator(
        HistGradientBoostingClassifier,
        {"early_stopping": False},  # the library would split rows of its own
        {
            "learning_rate": Positive,
            "max_iter": Count,
            "max_leaf_nodes": Annotated[int, Field(ge=2)] | None,
            "min_samples_leaf": Count,
            "l2_regularization": NotNegative,
            "max_bins": Annotated[int, Field(ge=2, le=255)],
        },
    ),
    "gaussian_nb": Estimator(GaussianNB, {}, {"var_smoothing": NotNegative}, seeded=False),
    "knn": Estimator(
        KNeighborsClassifier,
        {"n_jobs": 1},
        {"n_neighbors": Count, "weights": Literal["uniform", "distance"]},
        standardised=True,
        seeded=False,
    ),
    "linear_svm": Estimator(LinearSVC, {}, {"C": Positive, "max_iter": Count}, standardised=True),
    "mlp": Estimator(
        MLPClassifier,
        {},
        {
            "hidden_layer_sizes": tuple[Count, ...],
            "alpha": NotNegative,
            "learning_rate_init": Positive,
            "max_iter": Count,
        },
        standardised=True,
    ),
}
Name = Literal[
    "logistic_regression", "random_forest", "extra_trees", "hist_gradient_boosting",
    "gaussian_nb", "knn", "linear_svm", "mlp",
]  # fmt: skip


@component("reward_model", version=1)
@dataclass(frozen=True)
class Sklearn:
    """A scikit-learn classifier on single responses, target 1 for chosen and 0 for rejected, library defaults.

    estimator: one of the closed list; options: the few settings that its entry in ESTIMATORS allows. Logistic
    regression, nearest neighbours, linear SVM and MLP see standardised features. The score is the decision
    function, or the log odds of "chosen" where an estimator has none. Validation examples are not used.
    """

    estimator: Name = "logistic_regression"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        allowed = ESTIMATORS[self.estimator].options
        for name, value in self.options.items():
            if name not in allowed:
                raise unknown(f"option of estimator {self.estimator!r}", name, allowed)
            try:
                TypeAdapter(allowed[name]).validate_python(_frozen(value), strict=True)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise ConfigError(f"reward_model.options.{name}={value!r}: {problem[0].lower()}{problem[1:]}") from None

    def fit(self, data: TrainingData) -> FittedSklearn:
        """Fit on the protocol's training examples; raises DesignError on targets that are no labels."""
        examples = split_examples(data, pointwise=True)
        label = _labels(examples.train)
        if len(np.unique(label)) < 2:
            return FittedSklearn(None, history(examples))
        estimator = self.build(int(data.streams("init").integers(2**31)))
        estimator.fit(gathered(data.split, examples.train.first), label)
        return FittedSklearn(estimator, history(examples, epochs=_iterations(estimator)))

    def build(self, seed: int) -> Any:
        """The unfitted estimator."""
        entry = ESTIMATORS[self.estimator]
        chance = {"random_state": seed} if entry.seeded else {}
        options = {name: _frozen(value) for name, value in self.options.items()}
        estimator = entry.make(**{**entry.fixed, **options, **chance})
        return make_pipeline(StandardScaler(), estimator) if entry.standardised else estimator


@dataclass(frozen=True, eq=False)
class FittedSklearn:
    """A fitted classifier; None where the training examples held one class only, which gives a constant score."""

    estimator: Any
    history: Mapping[str, float | int | None]

    def score(self, split: Split) -> NDArray[np.float32]:
        """Proxy rewards [P, N]."""
        return score_in_chunks(split, self.score_rows)

    def score_rows(self, embedding: Floats) -> Floats:
        """Decision function or log odds [R] of embeddings [R, D]; a certain prediction counts as log odds +-40."""
        if self.estimator is None:
            return np.zeros(len(embedding))
        embedding = widened(embedding)
        if hasattr(self.estimator, "decision_function"):
            return np.asarray(self.estimator.decision_function(embedding))
        with np.errstate(divide="ignore"):
            rejected, chosen = self._log_probability(embedding).T
        return np.nan_to_num(chosen - rejected, nan=np.nan, posinf=CERTAIN, neginf=-CERTAIN)

    def _log_probability(self, embedding: Floats) -> Floats:
        """Log P of both classes [R, 2]; the estimator's own where it has one: naive Bayes does not saturate there."""
        if hasattr(self.estimator, "predict_log_proba"):
            return np.asarray(self.estimator.predict_log_proba(embedding))
        return np.log(self.estimator.predict_proba(embedding))

    def state(self) -> dict[str, NDArray[Any]]:
        """Empty: scikit-learn has no format that is safe to load."""
        return {}


def _labels(examples: Examples) -> NDArray[np.int64]:
    if not np.isin(examples.target, (0, 1)).all():
        raise DesignError(
            "reward_model.kind=sklearn learns from labels 0 and 1, the preferences hold probabilities; "
            "kinds linear, lgb and mlp take them"
        )
    return examples.target.astype(np.int64)


def _iterations(estimator: Any) -> int | None:
    """Iterations of the last step of a pipeline, where the estimator counts them."""
    last = estimator[-1] if hasattr(estimator, "steps") else estimator
    n = getattr(last, "n_iter_", None)
    return None if n is None else int(np.max(n))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
