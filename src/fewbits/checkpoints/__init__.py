"""Checkpoints on disk: reading hostile ones, writing whole ones, and going on where an interrupted run stopped."""
