"""The wire: each module turns one gRPC service's messages into domain types and back."""
