"""Evaluation: data sets, runs that survive, metrics and reports (`duet eval`)."""
