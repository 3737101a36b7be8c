"""rmsweep: controlled sweeps over preference-based reward models."""

__version__ = "0.1.0"
