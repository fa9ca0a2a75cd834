"""Measuring models: fidelity to a teacher, IFEval, speed, and paired comparison of what was measured."""
