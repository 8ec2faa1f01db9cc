"""Making of the embedded video model: moving scenes, training, judging and the model card.

See README.md in this folder for the commands.
"""
