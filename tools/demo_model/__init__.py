"""How the embedded demo model is made: drawings, scenes, training, judging and the model card.

See README.md in this folder for the commands.
"""
