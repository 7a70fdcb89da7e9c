"""Limits of the front end alone; those that other processes must know are in `runtime/config.py`."""

from __future__ import annotations

from typing import Final

from overcommit.runtime.config import KIB, MIB

# --- connections --------------------------------------------------------------------------------
CONNECTIONS_MAX: Final = 16_384
HEADER_LINES_MAX: Final = 256
HEAD_TIMEOUT_S: Final = 30.0  # from the first byte of a request to the end of its headers
BODY_TIMEOUT_S: Final = 120.0  # from there to the end of its body
WRITE_TIMEOUT_S: Final = 60.0  # a client that does not read its answer
LINGER_S: Final = 1.0  # reading on after a refusal, so that the client gets to see it
SMALL_BODY_BYTES: Final = 64 * KIB  # of settings and the like; longer bodies count against ...
BODIES_BYTES_MAX: Final = 512 * MIB  # ... which is this, for all connections of a front end
BULK_BYTES_MIN: Final = 128 * KIB  # binary tensors from here on are received where they are read
JOIN_BYTES_MAX: Final = 256 * KIB  # longer answers are not copied behind their headers

# --- requests -----------------------------------------------------------------------------------
HELD_REQUESTS_MAX: Final = CONNECTIONS_MAX  # requests that wait for a place at a worker
DETOUR_BYTES_MAX: Final = 64 * MIB  # of requests that go on from an occupied worker, at a time
WAKE_REQUESTS: Final = 4  # a worker that sleeps is woken at the latest when so many were pushed
IDLE_BLOCKS_MAX: Final = 1024  # pairs of the smallest blocks that stay together between requests
REGROWS_MAX: Final = 2  # larger egress blocks for one request
HINT_FADES: Final = 8  # each short answer takes this part of what a hint is above it
HINT_SHARE: Final = 0.75  # of the memory for answers: beyond, nobody gets more than must be
SWEEP_S: Final = 0.05  # granularity of deadlines and connection time-outs
PLANS_MAX: Final = 512  # remembered layouts of a version's requests, and of its answers
PLANNED_ROUTES_MAX: Final = 4096  # versions with remembered layouts
TEMPLATES_MAX: Final = 512  # remembered texts around the numbers of requests of one shape ...
LITERAL_BYTES_MAX: Final = 2 * KIB  # ... up to this long
LINES_MAX: Final = 16_384  # remembered request lines ...
FIELDS_MAX: Final = 4096  # ... and header lines that follow them ...
HEAD_BYTES_MAX: Final = 1 * KIB  # ... up to this long, together
DIMENSION_MAX: Final = 1 << 40
SPECIAL_STRINGS_MAX: Final = 100_000  # in a request's JSON beside NaN or the infinities
PARAMETERS_BYTES_MAX: Final = 1 * MIB  # of a request's JSON, all its parameters together
DECODE_HERE_BYTES: Final = 1 * MIB  # longer JSON is decoded by another thread ...
DECODE_PIECE_BYTES: Final = 256 * KIB  # ... so much at a time
LISTS_MAX: Final = 10_000  # of nested data, made as lists; more are read by their brackets
LABEL_FILES_MAX: Final = 1024  # with names of classes, remembered ...
LABELS_BYTES_MAX: Final = 1 * MIB  # ... up to this long
COMPRESS_BYTES_MIN: Final = 1 * KIB  # shorter answers are not compressed
COMPRESS_HERE_BYTES: Final = 32 * KIB  # longer ones are compressed by another thread

OVERRIDE_FILES_MAX: Final = 1024  # that come with one load

# --- gRPC: HTTP/2 connections and calls ----------------------------------------------------------
H2_STREAMS_MAX: Final = 1024  # calls of one connection at a time
H2_FRAME_BYTES_MAX: Final = 1 * MIB  # that we take; a client cuts its messages into such pieces
H2_WINDOW_BYTES: Final = 8 * MIB  # that a call may send before we have looked at it
H2_HEADERS_BYTES_MAX: Final = 16 * KIB  # of one call, as they are counted uncompressed ...
H2_BLOCK_BYTES_MAX: Final = 512 * KIB  # ... a call with more is refused; over this, its connection
H2_HEADS_MAX: Final = 256  # remembered header blocks of one connection
# Frames of a connection that ask for work and bring nothing (pings, settings, resets, empty data): so
# many in a row, or more resets than answers by so many, and the connection is closed.
H2_IDLE_FRAMES_MAX: Final = 1000
H2_IDLE_S: Final = 300.0  # without a byte of a client, we ask whether it is there ...
H2_PING_TIMEOUT_S: Final = 20.0  # ... and wait as long for it to say so
GRPC_JOIN_BYTES_MAX: Final = 64 * KIB  # longer answers go through the windows, piece by piece
GRPC_STREAM_REQUESTS_MAX: Final = 128  # of one stream at a time; more stay with the client
GRPC_TIMEOUT_S_MAX: Final = 86_400.0
GRPC_MESSAGE_CHARS_MAX: Final = 4096  # of an error's text
GRPC_ANSWERS_MAX: Final = 4096  # remembered layouts of answers

# --- embeddings of text ---------------------------------------------------------------------------
EMBEDDINGS_INPUTS_MAX: Final = 2048  # of one request
EMBEDDINGS_IN_FLIGHT: Final = 64  # of one request at a time: others want batches too
TEXT_MODELS_MAX: Final = 64  # tokenizers in memory; one may take 20 MB
TOKENS_MAX: Final = 1 << 17  # of one text, whatever its model says

# --- loop and control ---------------------------------------------------------------------------
DRAIN_ROUNDS_MAX: Final = 8  # ring sweeps before other connections get their turn
DRAIN_GRACE_S: Final = 1.0  # idle connections stay this long, to be told `Connection: close`
ADMIN_TIMEOUT_S: Final = 60.0
ADMIN_PENDING_MAX: Final = 256
ADMIN_PAGE_MAX: Final = 1000  # rows of one page of a listing
COUNTERS_PERIOD_S: Final = 1.0
LEASES_PERIOD_S: Final = 5.0  # between looks at who still holds the locks of leased regions
COUNTERS_MODELS_MAX: Final = 850  # of one message; with BatchCounters, at most 145 bytes long
POPULATE_STEP_BYTES: Final = 16 * MIB
