"""The pages on which people review candidates, in a file or on a server.

Imports detection, monitor and what these import.
Stages: none.
"""
