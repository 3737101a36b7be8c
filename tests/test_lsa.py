"""embedder=lsa: against a plain dense restatement, and what it must not see or lose."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from rmsweep import component
from rmsweep.embedders import lsa
from rmsweep.errors import DataError

WORDS = ["alpha", "beta", "gamma", "delta", "river", "stone", "green", "violet", "quick", "slow", "house"]


def make(**fields):
    return component.build("embedder", {"kind": "lsa", **fields})


def texts(n, seed=0, low=3, high=40):
    """(prompt, response) pairs of random words."""
    rng = np.random.default_rng(seed)
    return [(f"prompt {i}", " ".join(rng.choice(WORDS, rng.integers(low, high)))) for i in range(n)]


def dense_terms(fit_on, of, analyzer, ngrams):
    """(1 + log tf) (1 + log((1 + n) / (1 + df))), mean squared row norm of the fitted texts 1, float64."""
    counter = CountVectorizer(analyzer=analyzer, ngram_range=ngrams, min_df=2)
    train = counter.fit_transform(fit_on).toarray().astype(float)
    idf = 1 + np.log((1 + len(fit_on)) / (1 + (train > 0).sum(axis=0)))

    def weigh(tf):
        return np.where(tf > 0, 1 + np.log(np.maximum(tf, 1)), 0) * idf

    scale = np.sqrt((weigh(train) ** 2).sum(axis=1).mean())
    return weigh(counter.transform(of).toarray().astype(float)) / scale


def test_embedding_is_the_formula_up_to_rotation():
    """Catches a wrong weighting, block scale or global scale: inner products do not depend on the basis."""
    train, test = texts(40), texts(15, seed=1)
    e_train, e_test = make(dim=40).fit_embed(train, test, seed=0)
    r_train, r_test = ([r for _, r in side] for side in (train, test))
    x, y = (
        np.hstack([dense_terms(r_train, side, "word", (1, 2)), dense_terms(r_train, side, "char_wb", (3, 5))])
        for side in (r_train, r_test)
    )
    basis = np.linalg.svd(x, full_matrices=False)[2]
    wanted, projected = y @ basis.T @ basis @ x.T, x @ basis.T
    scale = np.mean(projected**2)
    np.testing.assert_allclose(e_test @ e_train.T, wanted / scale, rtol=1e-3, atol=1e-3 * np.abs(wanted / scale).max())
    assert np.mean(np.square(e_train)) == pytest.approx(1, rel=1e-4)


def test_repeated_runs_give_the_same_bits_and_the_seed_matters():
    """Catches randomness from anywhere but the seed."""
    train, test = texts(60), texts(20, seed=1)
    first, again, other = (make(dim=8).fit_embed(train, test, seed=s) for s in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert a.dtype == np.float32 and a.tobytes() == b.tobytes()
    assert not np.array_equal(first[0], other[0])


def test_fitted_on_training_texts_only():
    """Catches leakage: other test texts must not move any embedding of the training or the test side."""
    train, test = texts(50), texts(10, seed=1)
    plain, more = (make(dim=8).fit_embed(train, t, seed=0) for t in (test, [*test, *[("p", "unseen words only")] * 30]))
    np.testing.assert_array_equal(plain[0], more[0])
    np.testing.assert_allclose(plain[1], more[1][:10], rtol=1e-6)


def test_prompt_counts_only_when_asked():
    train, test = texts(30), texts(5, seed=1)
    changed = [("another prompt altogether", r) for _, r in test]
    for text, same in (("response", True), ("prompt_and_response", False)):
        one, two = (make(dim=6, text=text).fit_embed(train, t, seed=0)[1] for t in (test, changed))
        assert np.array_equal(one, two) == same


def test_length_survives():
    """Catches row normalisation: on this kind of data length alone ranks responses well."""
    train = [(f"p{i}", " ".join(np.random.default_rng(i).permutation(WORDS)[: 1 + i % len(WORDS)])) for i in range(120)]
    embedding, _ = make(dim=4).fit_embed(train, train[:1], seed=0)
    lengths = [len(r) for _, r in train]
    assert np.corrcoef(np.linalg.norm(embedding, axis=1), lengths)[0, 1] > 0.9


def test_chunks_and_sample_do_not_change_rows(monkeypatch):
    """Catches an off-by-one between chunks, and sampled rows written to the wrong places."""
    train, test = texts(30), texts(11, seed=1)
    whole = make(dim=5).fit_embed(train, test, seed=0)
    monkeypatch.setattr(lsa, "CHUNK_TEXTS", 4)
    for a, b in zip(whole, make(dim=5).fit_embed(train, test, seed=0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    train_rows, again = make(dim=5, fit_rows=12).fit_embed(train, train, seed=0)
    np.testing.assert_allclose(train_rows, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_fewer_texts_or_terms_than_dim(n):
    """Catches a crash of the SVD on small data; D is then the number of texts."""
    train, test = make(dim=256, min_df=1).fit_embed(texts(n), texts(4, seed=1), seed=0)
    assert train.shape == (n, n) and test.shape == (4, n) and np.isfinite(train).all()


def test_empty_responses_and_odd_texts_have_finite_embeddings():
    train = [*texts(20), ("p", ""), ("p", "\x00\u202e"), ("p", "\U0001f600 \u4e2d\u6587")]
    for side in make(dim=8).fit_embed(train, train[-3:], seed=0):
        assert np.isfinite(side).all()
    assert (make(dim=8).fit_embed(train, [("p", "")], seed=0)[1] == 0).all()


def test_one_block_alone_and_no_terms_at_all():
    """A block without terms is left out; with none left the message names the remedy."""
    single = [("p", "a b c"), ("p", "c b a")] * 10  # words of one letter: character n-grams only
    assert make(dim=2).fit_embed(single, single, seed=0)[0].shape == (20, 2)
    assert make(dim=3, char_features=0).fit_embed(texts(20), texts(2), seed=0)[1].shape == (2, 3)
    for fields, data in (
        ({}, [("p", "")] * 3),
        ({"min_df": 9}, texts(5)),
        ({"word_features": 0, "char_features": 0}, texts(5)),
    ):
        with pytest.raises(DataError, match=r"embedder\.min_df"):
            make(**fields).fit_embed(data, data, seed=0)
