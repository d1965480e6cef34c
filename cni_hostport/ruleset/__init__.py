"""The table of nftables: what it holds, what an attachment wants of it, the commands, and how listings are read.

Nothing in this room asks the kernel.
"""
