"""Latent semantic analysis, nothing downloaded: TF-IDF of words and of character n-grams, truncated SVD.

    x = [word TF-IDF / a ; character TF-IDF / b],     embedding e(x) = s V^T x

TF-IDF = (1 + log tf) (1 + log((1 + n) / (1 + df))), rows NOT normalised: how long a response is belongs to
the signal. a, b make the mean squared row norm of each block 1; V holds the leading right singular vectors of
the training rows; s makes the mean square of all training coordinates 1. Coordinates are not whitened:
leading ones are larger. (Deerwester et al. 1990, "Indexing by latent semantic analysis".)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd

from rmsweep.component import component
from rmsweep.errors import DataError
from rmsweep.rng import stream

Array = NDArray[np.float32]
Count = Annotated[int, Field(ge=1)]
CHUNK_TEXTS = 2048
POWER_ITERATIONS = 3  # of the randomised SVD; 5 change nothing measurable
NO_TERMS = ("empty vocabulary", "no terms remain", "documents than min_df")  # scikit-learn's messages


@component("embedder", version=1)
@dataclass(frozen=True)
class Lsa:
    """Text features fitted on training responses only.

    dim: D; fewer where the training texts or their terms are fewer. text: `response` (a prompt's own part is
    the same for all its responses, so it cannot rank them) or `prompt_and_response` in one text.
    word_features (1-2 grams) and char_features (3-5 grams within words): the most frequent ones; 0 leaves a
    block out. min_df: least number of texts that hold a term. fit_rows: vocabulary, IDF and SVD come from so
    many training texts at most, a random choice.
    """

    dim: Count = 256
    text: Literal["response", "prompt_and_response"] = "response"
    word_features: Annotated[int, Field(ge=0)] = 20_000
    char_features: Annotated[int, Field(ge=0)] = 20_000
    min_df: Count = 2
    fit_rows: Annotated[int, Field(ge=2)] = 20_000

    def fit_embed(
        self, train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]], seed: int
    ) -> tuple[Array, Array]:
        """Embeddings [R, D] float32 of (prompt, response) pairs of the training and the test split.

        Raises DataError when the training texts share no term at all.
        """
        texts = self._texts(train)
        rng = stream(seed, "lsa")
        sample = np.sort(rng.permutation(len(texts))[: self.fit_rows])
        fitted, terms = _Fitted.fit(self, [texts[i] for i in sample], rng)
        embedding = np.empty((len(texts), fitted.projection.shape[1]), dtype=np.float32)
        embedding[sample] = terms @ fitted.projection
        rest = np.setdiff1d(np.arange(len(texts)), sample)
        embedding[rest] = fitted.embed([texts[i] for i in rest])
        return embedding, fitted.embed(self._texts(test))

    def _texts(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        if self.text == "response":
            return [response for _, response in pairs]
        return [f"{prompt}\n\n{response}" for prompt, response in pairs]

    def _vectorizers(self) -> list[TfidfVectorizer]:
        blocks = (("word", (1, 2), self.word_features), ("char_wb", (3, 5), self.char_features))
        shared: dict[str, Any] = {
            "min_df": self.min_df,
            "sublinear_tf": True,
            "norm": None,
            "dtype": np.float32,
        }
        return [
            TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, max_features=features, **shared)
            for analyzer, ngrams, features in blocks
            if features
        ]


class _Fitted(NamedTuple):
    """Vectorizers, the factor of each block, and the scaled projection [features, D]."""

    vectorizers: list[TfidfVectorizer]
    factors: list[float]
    projection: Array

    @classmethod
    def fit(cls, config: Lsa, texts: list[str], rng: np.random.Generator) -> tuple[_Fitted, sp.csr_matrix]:
        """Fit on `texts`; also their terms x [len(texts), features]."""
        vectorizers, blocks = _vectorized(config, texts)
        factors = [float(np.sqrt(len(texts) / block.power(2).sum(dtype=np.float64))) for block in blocks]
        terms = _stacked(blocks, factors)
        dim = min(config.dim, *terms.shape)
        seed = int(rng.integers(2**31))
        _, singular, right = randomized_svd(terms, dim, n_iter=POWER_ITERATIONS, random_state=seed)
        scale = np.sqrt(len(texts) * dim / np.square(singular, dtype=np.float64).sum())
        return cls(vectorizers, factors, (right.T * scale).astype(np.float32)), terms

    def embed(self, texts: list[str]) -> Array:
        """Embeddings [len(texts), D], a chunk of texts at a time."""
        result = np.empty((len(texts), self.projection.shape[1]), dtype=np.float32)
        for start in range(0, len(texts), CHUNK_TEXTS):
            part = texts[start : start + CHUNK_TEXTS]
            terms = _stacked([v.transform(part) for v in self.vectorizers], self.factors)
            result[start : start + len(part)] = terms @ self.projection
        return result


def _vectorized(config: Lsa, texts: list[str]) -> tuple[list[TfidfVectorizer], list[Any]]:
    """The vectorizers that find any term in `texts`, and their TF-IDF matrices."""
    found = []
    for vectorizer in config._vectorizers():
        try:
            found.append((vectorizer, vectorizer.fit_transform(texts)))
        except ValueError as error:
            if not any(words in str(error) for words in NO_TERMS):
                raise
    if not found:
        raise DataError(
            f"embedder lsa: no term stands in {config.min_df} of the {len(texts)} training texts; "
            "lower embedder.min_df, allow word_features or char_features, or bring more text"
        )
    return [vectorizer for vectorizer, _ in found], [terms for _, terms in found]


def _stacked(blocks: list[Any], factors: list[float]) -> sp.csr_matrix:
    """Blocks side by side, each times its factor, float32 [rows, features]."""
    scaled = [block * np.float32(factor) for block, factor in zip(blocks, factors, strict=True)]
    return sp.hstack(scaled, format="csr", dtype=np.float32)
