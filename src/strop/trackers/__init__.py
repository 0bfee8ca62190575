"""Trackers: services and files that get every line of metrics.jsonl as well. Floor 2.

facts        what a tracker is told of the run when it starts
fan_out      all trackers of a run; what fails waits and is tried again
opening      the trackers that `logging.report_to` names
tensorboard, wandb, mlflow, trackio   one tracker each, through its own package
"""
