"""The four stages, pure functions of (config, inputs, named streams): generate, annotate, train, evaluate.

A version is part of every fingerprint: raise it when the stage's numbers change.
"""

VERSIONS = {"generate": 1, "annotate": 1, "train": 1, "evaluate": 1}
