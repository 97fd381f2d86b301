"""Files, tables, the detector, blob shapes and statistics; knows no stage.

Imports only the hall: errors and params.
Stages: none.
"""
