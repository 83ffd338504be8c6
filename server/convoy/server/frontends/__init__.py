"""Several processes answer callers for the one that owns the device.

One Python process parses a few thousand requests per second; a device may run more. With
`--front-ends N` the port is shared by N processes (SO_REUSEPORT), which do everything for a
request except the inference. Pixels reach the owner through shared memory, everything else as
messages over a socket pair, with those of one turn of the event loop together.

    caller ──► N front ends: endpoint, servicers, decoding, RemoteBatcher
                   │  pixels: Arena (shared memory)    messages: Link
                   ▼
               owner: Served → DynamicBatcher → backend;   repository, metrics

    ipc             the messages between the processes, their socket pair and the shared memory
    process         a front end
    served          both ends of a request: the front end's batcher, and a front end at its owner
    fleet           starts, follows and restarts the front ends
    merged_metrics  adds their metrics to the owner's
"""
