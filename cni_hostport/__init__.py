"""Host ports for containers: a chained CNI plugin on nftables."""

__version__ = "0.1.0"

LONGEST_IFNAME = 15  # bytes; the kernel's IFNAMSIZ is 16, with the final NUL
LARGEST_INPUT = 1 << 24  # bytes; a configuration of 10,000 host ports has less than one million
