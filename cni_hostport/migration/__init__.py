"""From portmap to hostport: what portmap left on a node, whose it is, and its end."""
