"""How to get an answer from a model server: tensors, the wire forms they travel in, the client.

tensors    values: a tensor, a request, a result; raw bytes to and from JSON
oip        the Open Inference Protocol v2 over REST, without a web framework
metadata   what a model declares, and whether a request fits it
frames     many requests or outcomes in one blob, for Redis, Postgres and the object store
packing    many small requests as one large one, and the answer cut back
client     NVIDIA Triton by gRPC, deadlines, cancellation; the only file that knows gRPC
fake       a Triton of Python functions behind the real protocol, for tests and demos
"""
