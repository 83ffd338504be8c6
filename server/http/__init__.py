"""The HTTP port: metrics and health, the Open Inference Protocol by REST, and a page to look at.

`listener` puts an ASGI application (`face`) on the server's own event loop. `rest` turns the
protocol's JSON and binary tensors into the domain types that gRPC uses too; `status` shows errors
as HTTP; `history` remembers the last minutes for the page.
"""
