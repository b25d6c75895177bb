"""fewbits makes transformer models small and runs them."""
