"""How many blobs are found, how many alarms are false, and what the gate says.

Imports all rooms before it: core to detection.
Stages: evaluate, regression, completeness, explore.
"""
