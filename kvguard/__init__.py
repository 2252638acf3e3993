"""kvguard: a fault-tolerance sidecar for serving engines. Importing the package imports nothing heavy."""

__version__ = "0.1.0"
