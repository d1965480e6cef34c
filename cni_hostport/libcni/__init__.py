"""What libcni reads and writes on a node: network configuration lists, and its cache of attachments."""
