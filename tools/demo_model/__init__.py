"""Making of the embedded demo model: drawings, scenes, training, judging and the model card.

See README.md in this folder for the commands.
"""
