// What the host says of a step before it is launched; edgellm/kernels/rows.py writes the same layout.
#pragma once

// One decode row. Its token is at position `past`; the slot holds past + 1 tokens afterwards.
struct Row {
  int slot;   // below 0: nobody's row, whose results nobody reads and which writes no cache
  int past;
  int token;  // below 0: the token sampled last for the slot
  int flags;
};

// A piece of one slot's prompt: token t is at position past + t.
struct Chunk {
  int slot;
  int past;
  int count;  // tokens that are there, at most the bucket's
  int flags;
};

constexpr int WANTS_TOKEN = 1;  // in `flags` of both: a token is to be sampled
