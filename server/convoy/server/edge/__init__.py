"""The network edge: h2corn, a compiled HTTP/1.1 and HTTP/2 server, embedded in our event loop.

listener     open a TCP port and run h2corn on it, with TLS that follows its files
limits       memory and time limits of connections and requests; the byte budget
connections  count the connections, and notice HTTP/1.1 callers that disconnect
application  the two ports: gRPC, REST and the page for callers; metrics and probes for operators
"""
