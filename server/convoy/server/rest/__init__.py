"""The Open Inference Protocol by REST, and the page.

`routes` and `codec` turn the protocol's JSON and binary tensors into the domain types that gRPC
uses too; `calls` maps errors to HTTP statuses; `ui` serves the page and `traffic`
remembers what it shows of the last minutes.
"""
