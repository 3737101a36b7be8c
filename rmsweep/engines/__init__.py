"""Engines: where tasks run. An engine never sees a cell's meaning; truth is what the store holds."""
