"""What nftables holds for host ports: its table, what an attachment wants of it, the commands, and how listings are read.

Nothing in this room asks the kernel.
"""
