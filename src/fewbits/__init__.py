"""fewbits makes transformer models small and runs them."""

__version__ = "0.1.0"
