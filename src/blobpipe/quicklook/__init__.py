"""The daily search: every new image of a folder, from its arrival to its place in the log.

Imports core to monitor.
Stages: none.
"""
