"""The version of this project: the build reads it from here, and datasets and their pages name it."""

__version__ = "0.1.0"
SOFTWARE = f"essence-distill {__version__}"
