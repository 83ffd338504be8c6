"""Several processes answer gRPC for the one that owns the device.

One Python process parses some thousands of requests a second; a device may run more. With
`--front-ends N` the port is shared by N processes (SO_REUSEPORT), which do all that a request needs
but the inference. Pixels reach the owner through memory that both map; everything else travels as
messages over a socket pair, those of one turn of an event loop together.

    caller ──► N front ends: GrpcFace, servicers, decoding, RemoteBatcher
                   │  pixels: Arena (shared memory)    messages: Link
                   ▼
               owner: Served → DynamicBatcher → backend;   repository, HTTP port, metrics

    arena      shares out the memory
    link       carries messages between two processes
    messages   what they say
    remote     the front end's batcher
    process    a front end
    served     a front end, as its owner sees it
    fleet      all of them: started, followed, started again
    metrics    their numbers beside the owner's
"""
