"""Communication between the ranks of one replica: groups, the mesh that they come from, the ring's transfers.

The exchange of heads (Ulysses) is in `attention/sharded.py`.
"""
