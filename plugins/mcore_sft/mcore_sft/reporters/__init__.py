"""Reporters that send a run's metrics to an experiment tracker."""
