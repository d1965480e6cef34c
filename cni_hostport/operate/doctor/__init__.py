"""``hostport doctor``: whether this node is fit for host ports, and those that it has are as they should be."""
