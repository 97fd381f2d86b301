"""Every day: fetch, scan, quicklook, its log, notices, the catalogue, exports.

Imports core to history; of validation nothing but the record of the gate.
Stages: none.
"""
