"""The gRPC endpoint, the C core as an alternative, and the servicers."""
