"""Communication between the ranks of one replica: groups, the mesh that they come from, the ring."""
