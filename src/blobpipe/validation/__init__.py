"""How many blobs are found, how many alarms are false, and what the gate says.

Imports all rooms before it: core to history.
Stages: evaluate, regression, completeness, explore.
"""
