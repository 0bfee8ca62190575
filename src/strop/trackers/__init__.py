"""Trackers: services and files that get every line of metrics.jsonl as well. Floor 2.

tracker      what a tracker is, and what it is told of the run when it starts
fan_out      all trackers of a run; what fails waits and is tried again
open_trackers   the trackers that `logging.report_to` names
tensorboard, wandb, mlflow, trackio   one tracker each, through its own package
"""
