"""Host ports for containers: a chained CNI plugin on nftables."""

__version__ = "0.1.0"
