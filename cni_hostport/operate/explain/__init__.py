"""``hostport explain``: why a connection to a host port does or does not reach a pod."""
