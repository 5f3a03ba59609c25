"""Experiment files that come along: each exports get_config(arg="") and, when it is a study, get_study(arg="")."""
