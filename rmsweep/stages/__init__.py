"""The stages after the bank, pure functions of (config, inputs, named streams): annotate, train, evaluate."""
