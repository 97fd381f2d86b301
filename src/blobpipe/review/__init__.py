"""The pages on which people review candidates, in a file or on a server.

Imports monitor and what that imports.
Stages: none.
"""
