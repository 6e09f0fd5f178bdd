"""How to get an answer from a model server: tensors, the wire forms they travel in, the client.

tensors    values: a tensor, a request, a result; raw bytes to and from JSON
metadata   what a model declares, and whether a request fits it
oip        the Open Inference Protocol v2 over REST, without a web framework
frames     many requests or outcomes in one blob, for Redis, Postgres and the object store
npy        numpy's files: headers, read and written
columns    Arrow's columns as rows of tensors, and back
parquet    Parquet files of such columns, in pieces; `parquet_pages` looks at them first
packing    many small requests as one large one, and the answer cut back
deadline   until when an answer is wanted, and calling it off
protocol   the values as messages of Triton's gRPC protocol
client     NVIDIA Triton by gRPC: the real model server
fake       a Triton of Python functions behind the same protocol, for tests and demos

Only the last three import gRPC: a gateway that needs none stays with the others.
"""

import os

# Before pyarrow is loaded, which reads it then. Its own allocator keeps what it was given: some
# 60 MB of a worker that has read a Parquet file.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
