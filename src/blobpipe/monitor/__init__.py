"""Every day: fetch, scan, the log of quicklook, notices, the catalogue, exports.

Imports core to history; of validation nothing but the record of the gate.
Stages: none.
"""
