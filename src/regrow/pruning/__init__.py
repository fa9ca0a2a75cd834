"""Calibrate, score, select, refit, rewrite."""
