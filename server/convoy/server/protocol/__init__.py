"""The Open Inference Protocol without its transports, shared by gRPC and REST."""
