"""Launchers: how an experiment is started on each platform."""
