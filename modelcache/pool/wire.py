"""The frames that parent and worker exchange. Shared by both, so it imports ``struct`` alone.

Each worker has two lanes, both stream sockets carrying ``header + payload`` frames in little-endian order.
Every header starts with the payload's length, then the kind of the frame:

*Request lane* (rows and predictions; served by the worker's main thread)::

    PREDICT  call, model, output, deadline, rows x columns   payload: float32, row-major; none if they are in a slot
    CANCEL   call                                            skip this call if it has not run
    PING     call                                            answered by PONG: the main thread is alive
    RESULT   call, seconds, shape                            payload: float32, row-major
    SHARED   call, seconds, shape                            RESULT whose values are in the slot that the rows were in
    SKIPPED  call                                            it was cancelled or past its deadline: its slot is free
    ERROR    call                                            the model refuses the rows; payload: message, UTF-8
    FAULT    call                                            the predictor is at fault, not the rows; payload: message

Rows of 64 KiB and more lie in a slot of memory that both sides share (shared.py), and the frame carries its
number, 0 for none. Whatever answers such a call carries it back: until then the slot is the worker's, which reports it
by SKIPPED if nobody wants the answer any more.

*Artifact lane* (bytes of models; served by the worker's loader thread)::

    BEGIN    model, allowed      an artifact follows; `allowed` is the unpacked size its reservation covers, 0 to be
                                 told by NEED what the first chunk announces
                                 payload: JSON with the `digest` of the artifact (SHA-256, hexadecimal) if it is known,
                                 and `save`, a path to write the model to once it has loaded, if that is wanted
    OPEN     model, allowed      BEGIN for a local copy, which the worker reads by itself
                                 payload: its SHA-256 (32 bytes), the bytes of heap that it took when it was loaded
                                 before, 0 if that is not known, and its path
    CHUNK    model               payload: the next bytes of the artifact
    END      model, rows         the artifact is complete: compare its digest, and load it
                                 payload: the rows that the loader is to try it on, float32, row-major; else a row of
                                 missing values
    GRANT    model, allowed      the reservation has grown
    UNLOAD   model               free the model, or forget the artifact
    CONVERT  model, allowed      give the model a second engine, which may take so many bytes, when all else is done
                                 payload: rows that it has been asked, float32, row-major, to compare both on
    MEASURE                      report the heap

    HELLO    pid                 the worker is up; payload: JSON with exact_heap, or with kind ("missing", "fault") and
                                 message of why it cannot serve
    NEED     model, bytes        unpacked, this artifact takes so many at least, more than `allowed`; waits for GRANT
                                 or UNLOAD; payload: JSON with `asked`, more than that if it may still be growing
    ANSWER   model, rows         comes before LOADED if there were rows: what the model predicts for them, as in RESULT,
                                 the number of dimensions behind the kind
    LOADED   model, bytes        measured heap; payload: seconds that it took to load, its unpacked bytes, and JSON with
                                 what the model says of itself, the same bytes for each model of which it is the same
    FAILED   model               payload: JSON with kind, message and facts
    SAVED    model, bytes        written to `save`, in the form that loads fastest; payload: JSON with its `digest`, or
                                 with the `error` that prevented it
    CONVERTED model, bytes       answers CONVERT, unless UNLOAD came first: what the second engine takes
                                 payload: JSON with the `refusal` that keeps the model as it is, or null
    UNLOADED model               its bytes are free
    HEAP     model, bytes        answers MEASURE: bytes in use

Which artifact the parser is at, so that a crash has a culprit, is in the worker's black box (blackbox.py).

Deadlines are seconds of CLOCK_MONOTONIC, which all processes of a host share; 0.0 means none. No frame carries
anything that is executed or unpickled on the other side.
"""

from __future__ import annotations

from struct import Struct

# kinds, request lane
PREDICT, CANCEL, PING, PONG, RESULT, ERROR, FAULT, SHARED, SKIPPED = range(1, 10)
# kinds, artifact lane
BEGIN, OPEN, CHUNK, END, GRANT, UNLOAD, MEASURE, CONVERT = range(16, 24)
HELLO, NEED, ANSWER, LOADED, SAVED, FAILED, UNLOADED, HEAP, CONVERTED = range(32, 41)

OUTPUTS = ("value", "margin", "leaf", "contribs")
"""What a call may ask for; a frame carries the index."""

REQUEST = Struct("<IBBHIIIId")
"""PREDICT, CANCEL, PING: payload length, kind, output, slot, call, model, rows, columns, deadline."""

REPLY = Struct("<IBBHIIIIf")
"""What the worker answers: payload length, kind, dimensions, slot, call, shape (3 numbers), seconds of prediction.

Of a batch each call is told its share, by its rows."""

ARTIFACT = Struct("<IBBHIQ")
"""Artifact lane, both directions: payload length, kind, dimensions, 0, model, bytes or rows."""

COPY = Struct("<32sQ")
"""What precedes the path of a local copy: its SHA-256, and the bytes that it is known to take."""

TOOK = Struct("<dQ")
"""What LOADED begins with: seconds, unpacked bytes."""

PAYLOAD_LIMIT = 1 << 20
"""Largest payload the parent puts into one frame, unless a single row is larger."""

FEW_ROWS = 16
"""The most rows of a call that a second engine answers: XGBoost is the faster one from about 64 on, of larger models
earlier."""
