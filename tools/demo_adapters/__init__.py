"""Making of the demo model's adapters: drawings, training, evaluation, cards and the picture of the README.

See README.md in this folder for the commands.
"""
